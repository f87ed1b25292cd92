"""One micro-batch: rows of a bucket side by side, captions of one length or padded under masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k5train.forward import routing


@dataclass(frozen=True)
class Group:
    """One forward pass: rows whose captions have one length, or padded ones with the lengths they had."""

    latents: Tensor
    """``[B, 1, H/8, W/8, 16]`` float32, scaled."""
    noise: Tensor
    """Like ``latents``, N(0, 1)."""
    sigma: Tensor
    """``[B]`` float32 in (0, 1)."""
    prompt_embeds: Tensor
    """``[B, L, 3584]`` in the dtype of the cache."""
    pooled_projections: Tensor
    """``[B, 768]``."""
    text_lengths: tuple[int, ...] | None = None
    """Of each caption, where ``prompt_embeds`` is padded behind it: the forward pass masks the rest. None: all L."""

    weight: Tensor | None = None
    """``[B]`` float32: what each row's error counts. None: 1."""
    mask: Tensor | None = None
    """``[B, 1, H/8, W/8, 1]`` float32, 0 to 1: where errors count. None: everywhere."""
    path: Tensor | None = None
    """``[B, k + 1]`` sigmas down to ``sigma``, of rows whose input the model makes itself. None: no row's."""
    scores: Tensor | None = None
    """``[B, routes, N]``: the order in which TREAD keeps tokens; on its way to ``routes``."""
    routes: tuple[routing.Route, ...] = ()
    """TREAD's, of this forward pass."""

    def to(self, device: torch.device) -> Group:
        """The same group on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Group:
        """The same group in page-locked memory, for copies that do not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Group:
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed, routes=tuple(replace(r, kept=change(r.kept)) for r in self.routes))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of one bucket."""

    rows: tuple[int, ...]
    """Of the mixture; of a single cache: positions in its index."""
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        """Rows in all groups."""
        return len(self.rows)


def pad(members: Sequence[Group]) -> Group:
    """Rows of one bucket as one group: captions end in zeros up to the longest, and ``text_lengths`` says where."""
    lengths = tuple(m.prompt_embeds.shape[1] for m in members for _ in m.sigma)
    longest = max(lengths)
    if set(lengths) == {longest}:
        return _cat(members)
    padded = [
        replace(m, prompt_embeds=F.pad(m.prompt_embeds, (0, 0, 0, longest - m.prompt_embeds.shape[1]))) for m in members
    ]
    return replace(_cat(padded), text_lengths=lengths)


def _cat(members: Sequence[Group]) -> Group:
    tensors = [name for name, value in vars(members[0]).items() if isinstance(value, Tensor)]
    together: dict[str, Any] = {name: torch.cat([vars(m)[name] for m in members]) for name in tensors}
    return Group(**together)
