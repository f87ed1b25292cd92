"""The sizes a block is compiled for: stand-ins at the plan's largest size, and what counts as new."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Sized(NamedTuple):
    """The inputs of a picture block whose sizes change from step to step."""

    x: Tensor
    text: Tensor
    rope: Tensor
    mask: Tensor | None

    def mark_dynamic(self) -> None:
        """Have one compilation serve every size."""
        for tensor, along in zip(self, _ALONG, strict=True):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, along)

    def kinds(self) -> tuple[tuple[int, ...] | None, ...]:
        """The shapes with 0 for a number of tokens, unless it is one: the compiler takes that for a constant."""

        def kind(tensor: Tensor | None, along: int) -> tuple[int, ...] | None:
            if tensor is None:
                return None
            return (*tensor.shape[:along], int(tensor.shape[along] == 1), *tensor.shape[along + 1 :])

        return tuple(map(kind, self, _ALONG))

    def at(self, sizes: tuple[int, int], taken: Collection[int]) -> _Sized:
        """Stand-ins for a picture and a caption of so many tokens, or a few more.

        Args:
            taken: no size is one of these: the compiler takes two sizes that are equal at first for one size.
        """
        chosen: list[int] = []
        for size in sizes:
            chosen.append(next(n for n in itertools.count(max(2, size)) if n not in {*taken, *chosen}))
        num_tokens, num_text_tokens = chosen

        def stand_in(tensor: Any, along: int, size: int) -> Any:
            if tensor is None or tensor.shape[along] == 1:
                return tensor
            shape = [*tensor.shape[:along], size, *tensor.shape[along + 1 :]]
            return tensor.new_zeros(shape).requires_grad_(tensor.requires_grad)

        return _Sized(*map(stand_in, self, _ALONG, (num_tokens, num_text_tokens, num_tokens, num_text_tokens)))


_ALONG = (1, 1, 1, 3)  # where _Sized's tensors have their tokens


def _words(sized: _Sized) -> str:
    """What may be new about a step, for a person who waits for the compiler."""
    caption = "captions of one token" if sized.text.shape[1] == 1 else "captions"
    masked = "" if sized.mask is None else ", masked"
    return f"{'training' if torch.is_grad_enabled() else 'drawing'} on {len(sized.x)} x {caption}{masked}"
