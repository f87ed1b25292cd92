"""How is int8 multiplied on Hopper cards? With their asynchronous tensor cores and memory copies, written in Gluon.

Triton makes only products that accumulate float32 asynchronous, so in its own language each int8 product is waited for.
Here a product runs while the next tiles are copied, and those of the next result before this one is stored.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from k5train.forward import kernels


class Tile(NamedTuple):
    """A program's part of the result, the steps along K, and how many of these are in memory at once."""

    columns: int
    step: int
    stages: int


# Timed on an H200 over the int8 matmuls of a step at 1024x1024. A result of 2,560 columns leaves a quarter of the card
# without work in the last round of the wide tiles.
_WIDE, _SQUARE = Tile(256, 64, 6), Tile(128, 128, 4)
_ROWS, _WARPS, _GROUP = 128, 8, 8
_MOST_NARROW = 4096  # columns, up to which the square tile is the faster one
_FEW_ROWS = 1536  # up to these, Triton's two programs on a multiprocessor are as fast or faster


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _place(program, tiles_m, tiles_n, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """The tile of a program: some down, then one across, so that programs that run together share rows of a and b."""
    group = program // (GROUP * tiles_n)
    together = gl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + (program % (GROUP * tiles_n)) % together, (program % (GROUP * tiles_n)) // together


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store(result, row, column, c, M, N, ROWS: gl.constexpr, WARPS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Store 128 columns, 16 bytes a thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    values = gl.convert_layout(result.to(c.dtype.element_ty), layout)
    m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    n = column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    at = c + m[:, None].to(gl.int64) * N + n[None, :]
    gl.store(at, values, mask=(m[:, None] < M) & (n[None, :] < N))


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _copy(a, b, a_tiles, b_tiles, barriers, slot, row, column, k, inside, BYTES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Start to copy one step of both operands."""
    barrier = barriers.index(slot)
    mbarrier.expect(barrier, BYTES, pred=inside)
    tma.async_copy_global_to_shared(a, [row, k], barrier, a_tiles.index(slot), pred=inside)
    tma.async_copy_global_to_shared(b, [column, k], barrier, b_tiles.index(slot), pred=inside)


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _finish(  # type: ignore[no-untyped-def]
    total, row, column, a_scale, b_scale, bias, z, up, c, z_tile, up_tile,
    M, N, R, stride_z, stride_up_n, stride_up_r,
    HAS_COLUMN_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, RANK_BLOCK: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Apply scales, bias and LoRA, and store."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16])
    result = gl.convert_layout(total.to(gl.float32), layout, assert_trivial=True)
    m = gl.minimum(row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), M - 1)
    n = gl.minimum(column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)), N - 1)
    result = result * gl.load(a_scale + m)[:, None]
    if HAS_COLUMN_SCALE:
        result = result * gl.load(b_scale + n).to(gl.float32)[None, :]
    if HAS_BIAS:
        result = result + gl.load(bias + n).to(gl.float32)[None, :]
    if RANK_BLOCK > 0:
        small: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
        z_m = gl.minimum(row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, small)), M - 1)
        up_n = gl.minimum(column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, small)), N - 1)
        for start in range(0, R, RANK_BLOCK):
            r = start + gl.arange(0, RANK_BLOCK, layout=gl.SliceLayout(0, small))
            inside = (r < R)[None, :]
            z_tile.store(gl.load(z + z_m[:, None] * stride_z + r[None, :], mask=inside, other=0.0))
            up_at = up + up_n[:, None] * stride_up_n + r[None, :] * stride_up_r
            up_tile.store(gl.load(up_at, mask=inside, other=0.0))
            fence_async_shared()
            gl.thread_barrier()
            result = warpgroup_mma(z_tile, up_tile.permute((1, 0)), result, is_async=False)
    if COLUMNS == 256:
        left, right = gl.split(gl.permute(gl.reshape(result, [ROWS, 2, 128]), [0, 2, 1]))
        _store(left, row, column, c, M, N, ROWS, WARPS)
        _store(right, row, column + 128, c, M, N, ROWS, WARPS)
    else:
        _store(result, row, column, c, M, N, ROWS, WARPS)


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _int8_matmul_hopper(  # type: ignore[no-untyped-def]
    a, b, a_scale, b_scale, bias, z, up, c, M, N, K, R, stride_z, stride_up_n, stride_up_r,
    HAS_COLUMN_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, RANK_BLOCK: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    # Gluon knows no int8 product of 256 columns at once, so a wide tile is two of 128.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 32])
    size: gl.constexpr = (ROWS + COLUMNS) * STEP
    a_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, STEP], a.layout)
    b_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, STEP], b.layout)
    if RANK_BLOCK > 0:
        rank_layout: gl.constexpr = gl.NVMMASharedLayout(2 * RANK_BLOCK, 16, 2)
        z_tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, RANK_BLOCK], rank_layout)
        up_tile = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, RANK_BLOCK], rank_layout)
    else:  # not used
        z_tile = a_tiles.index(0)
        up_tile = b_tiles.index(0)
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
    tiles_m, tiles_n, steps = gl.cdiv(M, ROWS), gl.cdiv(N, COLUMNS), gl.cdiv(K, STEP)
    tiles = tiles_m * tiles_n

    next_tile, next_step = gl.program_id(0), 0  # what is copied next, ahead of what is multiplied
    next_m, next_n = _place(next_tile, tiles_m, tiles_n, GROUP)
    for i in gl.static_range(STAGES - 1):
        _copy(a, b, a_tiles, b_tiles, barriers, i, next_m * ROWS, next_n * COLUMNS, next_step * STEP,
              next_tile < tiles, size)  # fmt: skip
        next_step += 1
        if next_step == steps:
            next_step = 0
            next_tile += gl.num_programs(0)
            next_m, next_n = _place(next_tile, tiles_m, tiles_n, GROUP)
    slot, phase, free = 0, 0, STAGES - 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = gl.zeros([ROWS, COLUMNS], gl.int32, layout)
        for _ in range(0, steps):
            mbarrier.wait(barriers.index(slot), phase)
            running = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=[running])
            gl.thread_barrier()  # all warps are done with the product before this one, whose tiles are replaced now
            _copy(a, b, a_tiles, b_tiles, barriers, free, next_m * ROWS, next_n * COLUMNS, next_step * STEP,
                  next_tile < tiles, size)  # fmt: skip
            next_step += 1
            if next_step == steps:
                next_step = 0
                next_tile += gl.num_programs(0)
                next_m, next_n = _place(next_tile, tiles_m, tiles_n, GROUP)
            free = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase = phase ^ 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        _finish(total, tile_m * ROWS, tile_n * COLUMNS, a_scale, b_scale, bias, z, up, c, z_tile, up_tile,
                M, N, R, stride_z, stride_up_n, stride_up_r,
                HAS_COLUMN_SCALE, HAS_BIAS, RANK_BLOCK, ROWS, COLUMNS, WARPS)  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(barriers.index(i))


def takes(a: Tensor, b: Tensor, z: Tensor | None, segments: int) -> bool:
    """Whether ``int8_matmul`` is meant for these: many rows, one adapter at most, and operands the copies can read."""
    is_aligned = a.shape[1] % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (a, b))
    return a.shape[0] > _FEW_ROWS and segments == 1 and is_aligned and (z is None or z.dtype == torch.bfloat16)


@functools.cache
def _layout(step: int) -> Any:
    return gl.NVMMASharedLayout(step, 8, 2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_compiled: dict[Any, Any] = {}


def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As ``kernels.int8_matmul``, for what it ``takes``."""
    (rows, inner), columns = a.shape, b.shape[0]
    tile = _WIDE if columns > _MOST_NARROW else _SQUARE
    layout, rank = _layout(tile.step), 0 if up is None else up.shape[1]
    operands = (
        TensorDescriptor(a, [rows, inner], [inner, 1], [_ROWS, tile.step], layout),
        TensorDescriptor(b, [columns, inner], [inner, 1], [tile.columns, tile.step], layout),
    )
    c = torch.empty(rows, columns, dtype=dtype, device=a.device)
    rest = [a_scale, *(a if t is None else t for t in (b_scale, bias, z, up)), c]
    numbers = (
        rows, columns, inner, rank,
        0 if z is None else z.stride(0), 0 if up is None else up.stride(0), 0 if up is None else up.stride(1),
        b_scale is not None, bias is not None, 16 if rank else 0,
        _ROWS, tile.columns, tile.step, tile.stages, _GROUP, _WARPS,
    )  # fmt: skip
    programs = min(_multiprocessors(a.device), triton.cdiv(rows, _ROWS) * triton.cdiv(columns, tile.columns))
    key = (a.device, numbers, *((t.dtype, t.data_ptr() % 16 == 0) for t in rest))
    compiled = _compiled.get(key) if kernels.is_direct else None
    if compiled is None:
        _compiled[key] = _int8_matmul_hopper[(programs, 1, 1)](*operands, *rest, *numbers, num_warps=_WARPS)
    else:
        compiled[(programs, 1, 1)](*operands, *rest, *numbers)
    return c
