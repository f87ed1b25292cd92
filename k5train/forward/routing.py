"""What does a TREAD route do to tensors? Tokens skip a stretch of blocks and return behind it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Route:
    """A stretch of blocks, and the tokens of each picture that go through it. The others skip it."""

    start: int
    """First visual block of the stretch; negative counts from the end."""
    end: int
    """Last visual block of the stretch."""
    kept: Tensor
    """``[B, K]`` int64: ascending positions, among the N tokens of the picture, of those that go through."""


def leave(visual: Tensor, rope: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Part from the dropped tokens: those that go on, ``[B, K, D]``, and their rotations, ``[B, K, 1, d/2, 2, 2]``.

    Args:
        visual: ``[B, N, D]``.
        rope: ``[1, N, 1, d/2, 2, 2]``.
    """
    tokens = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
    return tokens, rope[0][kept]


def come_back(visual: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
    """``[B, N, D]``: ``visual`` from before the stretch, with the tokens that went through it in their places."""
    return visual.scatter(1, kept[..., None].expand(-1, -1, visual.shape[-1]), tokens)
