"""Kernels in Triton: the int8 matmul on tensor cores, and what prepares int8 weights for a matmul.

The int8 matmul applies scales, bias and LoRA before it stores the result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5cache.shared.device import is_rocm
from k5train.forward.tiles import tile_for


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _int8_matmul(  # type: ignore[no-untyped-def]
    a, a_scale, b, b_scale, bias, z, up, c,
    M, N, K, R, segment,
    stride_z, stride_up_n, stride_up_r,
    HAS_COLUMN_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, RANK_BLOCK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Tiles go GROUP_M down, then one across, so that programs that run together find rows of a and b in the L2 cache.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % rows_in_group
    tile_n = (program % (GROUP_M * tiles_n)) // rows_in_group

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_in, n_in = m % M, n % N  # tiles beyond the edge repeat valid rows, which the store masks
    a_at = a + m_in[:, None].to(tl.int64) * K + k[None, :]
    b_at = b + n_in[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_tile, b_tile = tl.load(a_at), tl.load(b_at)
        else:
            a_tile = tl.load(a_at, mask=(start + k)[None, :] < K, other=0)
            b_tile = tl.load(b_at, mask=(start + k)[:, None] < K, other=0)
        total = tl.dot(a_tile, b_tile, total, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K

    result = total.to(tl.float32) * tl.load(a_scale + m_in)[:, None]
    if HAS_COLUMN_SCALE:
        result *= tl.load(b_scale + n_in).to(tl.float32)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n_in).to(tl.float32)[None, :]
    if RANK_BLOCK > 0:
        offset = (tile_n * BLOCK_N) // segment * R  # columns of z that belong to this segment of the output
        for start in range(0, R, RANK_BLOCK):
            r = start + tl.arange(0, RANK_BLOCK)
            z_tile = tl.load(z + m_in[:, None] * stride_z + offset + r[None, :], mask=r[None, :] < R, other=0.0)
            up_tile = tl.load(
                up + n_in[None, :] * stride_up_n + r[:, None] * stride_up_r, mask=r[:, None] < R, other=0.0
            )
            result = tl.dot(z_tile, up_tile, result)
    at = c + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, result.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _transpose(source, target, rows, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(source + row[:, None] * columns + column[None, :],
                   mask=(row[:, None] < rows) & (column[None, :] < columns), other=0)  # fmt: skip
    tl.store(target + column[:, None] * rows + row[None, :], tl.trans(tile),
             mask=(column[:, None] < columns) & (row[None, :] < rows))  # fmt: skip


def transpose(source: Tensor, target: Tensor) -> Tensor:
    """Transpose a contiguous ``[R, C]`` int8 into ``[C, R]``. torch takes 85 us for 2560 x 10240 on an H200.

    Returns:
        ``target``.
    """
    source = source.contiguous()
    rows, columns = source.shape
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128), 1)
    launch(_transpose, grid, (source, target), (rows, columns, 128), 8, 3)
    return target


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scale_rows(weight, scale, target, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    scales = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)
    scaled = tl.load(weight + at, mask=inside, other=0).to(tl.float32) * scales[:, None]
    tl.store(target + at, scaled.to(target.dtype.element_ty), mask=inside)


def scale_rows(weight: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """``scale * weight`` with torch's bits: multiplied in float32 and rounded once.

    On an H200 this takes 23 us for 10240 x 2560, which is the speed of its memory; torch's broadcast takes 104.

    Args:
        weight: ``[N, K]`` int8.
        scale: ``[N, 1]``.
        target: ``[N, K]`` in the scale's dtype, contiguous.

    Returns:
        ``target``.
    """
    weight = weight.contiguous()
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, 4), triton.cdiv(columns, 1024), 1)
    launch(_scale_rows, grid, (weight, scale.contiguous(), target), (rows, columns, 4, 1024), 4, 3)
    return target


is_direct = True
"""Launch compiled kernels without Triton's own look-up, with which an int8 matmul took 93 us of the processor beside an
H200, under the profiler. ``ops`` turns this off if this version of Triton launches them in another way."""

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], warps: int,
    stages: int,
) -> None:  # fmt: skip
    """``kernel[grid](*tensors, *numbers)``. The key is what Triton compiles for: types, alignment, numbers."""
    key = (kernel, tensors[0].device, numbers, warps, stages, *((t.dtype, t.data_ptr() % 16 == 0) for t in tensors))
    compiled = _compiled.get(key) if is_direct else None
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *numbers, num_warps=warps, num_stages=stages)  # None if interpreted
    else:
        compiled[grid](*tensors, *numbers)


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    segments: int,
    dtype: torch.dtype,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """``(a @ b.T) * a_scale * b_scale + bias + z @ up.T``, see ``ops._int8_matmul``. Needs a GPU.

    Args:
        a: ``[M, K]`` int8, contiguous.
        b: ``[N, K]`` int8, contiguous: both operands run along K, as int8 tensor cores need them.
        tile: use this one and not the table's, to time it or to run it in Triton's interpreter.
    """
    a, b = a.contiguous(), b.contiguous()
    rows, inner = a.shape
    columns = b.shape[0]
    if tile is None:
        tile = tile_for(rows, _capability(a.device), is_rocm())
    block_m, block_n, block_k, warps, stages = tile
    segment = columns // segments
    if segments > 1 and segment % block_n:  # a tile must not span two adapters
        block_n = 64 if segment % 64 == 0 else 16
    rank = 0 if up is None else up.shape[1]
    rank_block = 16 if rank else 0  # wider blocks spill registers: 136 bytes a thread at 32 on sm_90
    c = torch.empty(rows, columns, dtype=dtype, device=a.device)
    absent: Any = a  # a pointer that is never read
    launch(
        _int8_matmul, (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n), 1, 1),
        (a, a_scale, b, absent if b_scale is None else b_scale, absent if bias is None else bias,
         absent if z is None else z, absent if up is None else up, c),
        (rows, columns, inner, rank, segment,
         0 if z is None else z.stride(0), 0 if up is None else up.stride(0), 0 if up is None else up.stride(1),
         b_scale is not None, bias is not None, rank_block, inner % block_k == 0,
         block_m, block_n, block_k, 8),
        warps, stages,
    )  # fmt: skip
    return c
