"""Tokens leave a stretch of blocks and return behind it: what a TREAD route does to tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Route:
    """One stretch of blocks, and the tokens of each picture that walk through it."""

    start: int
    """First visual block that the others skip; negative counts from the end."""
    end: int
    """Last of them."""
    kept: Tensor
    """``[B, K]`` int64, ascending positions among the N tokens of the picture."""


def leave(visual: Tensor, rope: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that walk on, ``[B, K, D]``, and their rotations, ``[B, K, 1, d/2, 2, 2]``.

    Args:
        visual: ``[B, N, D]``.
        rope: ``[1, N, 1, d/2, 2, 2]``.
    """
    walking = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
    return walking, rope[0][kept]


def come_back(whole: Tensor, walked: Tensor, kept: Tensor) -> Tensor:
    """``[B, N, D]``: ``whole`` as it was, with the tokens that walked in their places."""
    return whole.scatter(1, kept[..., None].expand(-1, -1, whole.shape[-1]), walked)
