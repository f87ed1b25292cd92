"""For which sizes is a block compiled? Stand-ins of the plan's largest size, and what needs another compilation."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SizedInputs(NamedTuple):
    """The inputs of a picture block whose sizes change from step to step."""

    x: Tensor
    text: Tensor
    rope: Tensor
    lengths: Tensor | None

    def mark_dynamic(self) -> None:
        """Have one compilation serve every number of tokens."""
        for tensor, axis in zip(self, _TOKEN_AXES, strict=True):
            if tensor is not None and axis is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def kind(self) -> tuple[tuple[int, ...] | None, ...]:
        """What is compiled apart: the shapes, with 0 for any number of tokens but 1, a constant to the compiler."""

        def shape(tensor: Tensor | None, axis: int | None) -> tuple[int, ...] | None:
            if tensor is None or axis is None:
                return None if tensor is None else tuple(tensor.shape)
            return (*tensor.shape[:axis], int(tensor.shape[axis] == 1), *tensor.shape[axis + 1 :])

        return tuple(map(shape, self, _TOKEN_AXES))

    def stand_ins(self, sizes: tuple[int, int], taken: Collection[int]) -> SizedInputs:
        """Zeros in the place of these inputs, for a picture and a caption of so many tokens or a few more.

        Args:
            sizes: tokens of the picture and of the caption.
            taken: numbers that a size must not be. The compiler takes two sizes that are equal at first for one size.
        """
        chosen: list[int] = []
        for size in sizes:
            chosen.append(next(n for n in itertools.count(max(2, size)) if n not in {*taken, *chosen}))
        num_tokens, num_text_tokens = chosen

        def stand_in(tensor: Any, axis: int | None, size: int) -> Any:
            if axis is None:  # captions in the plan's size may be shorter than these
                return None if tensor is None else torch.ones_like(tensor)
            if tensor is None or tensor.shape[axis] == 1:
                return tensor
            shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
            return tensor.new_zeros(shape).requires_grad_(tensor.requires_grad)

        return SizedInputs(*map(stand_in, self, _TOKEN_AXES, (num_tokens, num_text_tokens) * 2))

    def describe(self) -> str:
        """What may be new about a step, for a person who waits for the compiler."""
        caption = "captions of one token" if self.text.shape[1] == 1 else "captions"
        padded = "" if self.lengths is None else ", padded"
        return f"{'training' if torch.is_grad_enabled() else 'drawing'} on {len(self.x)} x {caption}{padded}"


_TOKEN_AXES = (1, 1, 1, None)  # along which axis each of the inputs has its tokens
