"""How does one decoder layer take captions of different lengths at once? Side by side, never padded.

A pack is a row of captions. Every linear and norm runs once over all its tokens; attention runs once for each length
in it, through the library's own SDPA function, so no caption sees another and no token is wasted. For a pack of one
caption this is the pipeline's own forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ATTENTION = "k5_side_by_side"
_TABLES = 128  # rotary tables with pictures that are kept, 0.3 MB each; there may be thousands


@dataclass(frozen=True)
class Pack:
    """Captions that share a forward pass."""

    members: tuple[int, ...]
    """Positions of the captions in the request, in the order of their rows."""
    lengths: tuple[int, ...]
    """Tokens of each; equal ones side by side."""

    @property
    def num_tokens(self) -> int:
        """Rows of the pack's hidden states."""
        return sum(self.lengths)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(captions, tokens of each) for each length in turn."""
        return tuple((len(list(equal)), length) for length, equal in groupby(self.lengths))


def make_packs(lengths: Sequence[int], batch_tokens: int) -> list[Pack]:
    """Captions of these lengths in packs of at most ``batch_tokens`` tokens; a longer caption gets its own pack.

    The longest come first, so that a card that is too small fails at once. ``batch_tokens = 1`` gives each caption its
    own pack.
    """
    packs: list[list[int]] = []
    left = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not packs or lengths[i] > left:
            packs.append([])
            left = batch_tokens
        packs[-1].append(i)
        left -= lengths[i]
    return [Pack(tuple(pack), tuple(lengths[i] for i in pack)) for pack in packs]


def attention_kernels(exact: bool) -> AbstractContextManager[Any]:
    """A context that limits which attention kernels torch may choose.

    ``exact`` allows all of them, as the pipeline does. Otherwise cuDNN's attention, which torch may choose on Hopper
    and Blackwell, is left out: it makes a new plan for every length. That is the likely reason why 512 captions of
    250 lengths took 9.8 s on an H200 the first time and 2.8 s the second.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if exact:
        return nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    manager: AbstractContextManager[Any] = sdpa_kernel(kernels)
    return manager


def attend_side_by_side(config: Any) -> None:
    """Make the layers of this config compute attention by the ``runs`` that they are called with."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    config._attn_implementation = _ATTENTION


def run_layer(layer: Any, states: torch.Tensor, positions: Any, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Run one ``Qwen2_5_VLDecoderLayer`` over a pack.

    Args:
        states: ``[1, tokens, hidden]``.
        positions: cosines and sines of the pack's rows, from ``Positions``.
        runs: ``Pack.runs``.
    """
    out = layer(
        states, attention_mask=None, position_ids=None, position_embeddings=positions, use_cache=False, k5_runs=runs
    )
    return out[0] if isinstance(out, tuple) else out  # a tuple in some versions of transformers


class Positions:
    """Rotary cosines and sines of a pack, computed by the model's own module once for each length and picture.

    A caption's tokens are at 0..L-1 on all three axes, as the model numbers them when it is given no positions. With a
    picture among them, the axes differ.
    """

    def __init__(
        self, rotary: Any, states: torch.Tensor, places: Sequence[Hashable], rope: Callable[[int], torch.Tensor]
    ) -> None:
        """``places``: of each caption's picture, or None. ``rope``: positions ``[3, 1, L]`` of a caption with one."""
        self._rotary, self._like, self._places, self._rope = rotary, states, places, rope
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._with_picture: OrderedDict[Hashable, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def of(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of every token. The batch dimension is 1; the others have the library's shape."""
        import torch

        tables = [self._of(member, length) for member, length in zip(pack.members, pack.lengths, strict=True)]
        if len(tables) == 1:
            return tables[0]
        return torch.cat([cos for cos, _ in tables], dim=-2), torch.cat([sin for _, sin in tables], dim=-2)

    def _of(self, member: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        place = self._places[member]
        if place is not None:
            return self._of_picture(member, (length, place))
        if length not in self._known:
            ids = torch.arange(length, device=self._like.device).view(1, 1, -1).expand(3, 1, -1)
            self._known[length] = self._rotary(self._like, ids)
        return self._known[length]

    def _of_picture(self, member: int, key: Hashable) -> tuple[torch.Tensor, torch.Tensor]:
        if key not in self._with_picture:
            if len(self._with_picture) == _TABLES:
                self._with_picture.popitem(last=False)
            self._with_picture[key] = self._rotary(self._like, self._rope(member).to(self._like.device))
        return self._with_picture[key]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    k5_runs: tuple[tuple[int, int], ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each caption. query, key, value: ``[1, heads, tokens, head_dim]``, as a layer gives them.

    Returns:
        ``[1, tokens, heads, head_dim]``.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if len(k5_runs) <= 1 and sum(count for count, _ in k5_runs) <= 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs, start = [], 0
    for count, length in k5_runs:
        stop = start + count * length
        parts = (
            # [1, heads, count * length, d] as [count, heads, length, d]: a view
            t[0, :, start:stop].view(t.shape[1], count, length, t.shape[3]).transpose(0, 1)
            for t in (query, key, value)
        )
        output, _ = sdpa_attention_forward(module, *parts, None, **kwargs)
        outputs.append(output.flatten(0, 1))  # [count, length, heads, d] -> rows
        start = stop
    return torch.cat(outputs)[None], None
