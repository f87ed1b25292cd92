"""In which tiles does the int8 kernel cut a matmul? By card, as a table."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One program's part of the result, the steps in which it walks along K, and how Triton compiles it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that its int8 operands take."""
        return (self.block_m + self.block_n) * self.block_k * self.stages


# By the first number of the compute capability. On Hopper, Triton waits for an int8 product before it starts the next,
# so two programs share a multiprocessor: while one waits or stores, the other computes. Timed on an H200, all int8
# matmuls of a step at 1024x1024: 79 ms, where one program with a tile of 128 x 256 takes 98.
_LARGE = {9: Tile(128, 128, 128, 4, 3)}
# Of others, the largest that ptxas compiles without spilling registers (166 of 255 on sm_89). Not timed.
_OTHER_LARGE = Tile(128, 128, 64, 8, 3)
_SMALL = Tile(64, 64, 128, 4, 4)
# AMD's numbers mean other cards (9 is MI300 or Vega), and all of them have 64 KiB of shared memory. Not tried.
_ROCM_LARGE, _ROCM_SMALL = Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)
_FEW_ROWS = 512  # of captions: with large tiles, they leave most multiprocessors idle


def tile_for(rows: int, capability: int, is_rocm: bool) -> Tile:
    """The tile for a matmul of ``rows`` rows.

    Args:
        capability: the first number of the card's compute capability.
    """
    if is_rocm:
        return _ROCM_SMALL if rows <= _FEW_ROWS else _ROCM_LARGE
    return _SMALL if rows <= _FEW_ROWS else _LARGE.get(capability, _OTHER_LARGE)
