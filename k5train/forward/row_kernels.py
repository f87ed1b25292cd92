"""How are a row's gelu, RoPE and rounding to int8 computed on a GPU? In Triton kernels that read the row once.

The compiler's own kernels pass over a row two or three times, and compute everything that leads to its largest value
once for that value and once for each number. Here a row's numbers stay in registers, in a few tiles side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5train.forward.kernels import launch

_MOST_COLUMNS = 16384  # of a row that stays in registers: 64 of each thread of 8 warps
_MOST_TILES = 16


def tiles_of(columns: int) -> tuple[int, int] | None:
    """The tiles of a row, as width and count: widths are powers of two. None: rows of this width do not fit."""
    width = min(2048, columns & -columns)
    count = columns // width
    return (width, count) if columns <= _MOST_COLUMNS and count <= _MOST_TILES else None


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _normal(x):  # type: ignore[no-untyped-def]
    """The normal distribution's share below x, and exp(-x^2 / 2)."""
    # erf as in Abramowitz and Stegun, 7.1.26: off by less than 1.5e-7, which is about what float32 rounds off.
    bell = tl.exp2(x * x * -0.7213475204444817)
    t = 1.0 / (1.0 + tl.abs(x) * 0.23164189)
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = series * bell
    return tl.where(x >= 0, 1.0 - tail, tail), bell


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _larger(bits, x):  # type: ignore[no-untyped-def]
    """The larger of ``bits`` and a row's absolute values, as integers: there NaN is larger than any number."""
    return tl.maximum(bits, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scales(bits):  # type: ignore[no-untyped-def]
    largest = tl.maximum(bits, 0x2B8CBCCC).to(tl.float32, bitcast=True)  # at least 1e-12
    return tl.div_rn(127.0, largest), tl.div_rn(largest, 127.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(x, factor):  # type: ignore[no-untyped-def]
    # Added to this number, a float32 has no bits left behind the point, and its last byte is the int8.
    return (x * factor[:, None] + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gelu_quantize(  # type: ignore[no-untyped-def]
    hidden, result, scales, kept, M, N: tl.constexpr, KEEP: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    at = row[:, None].to(tl.int64) * N + tl.arange(0, WIDTH)[None, :]
    bits = tl.zeros((1,), tl.int32)
    values = ()
    for i in tl.static_range(TILES):
        x = tl.load(hidden + at + i * WIDTH).to(tl.float32)
        share, _ = _normal(x)
        value = x * share
        if KEEP:
            tl.store(kept + at + i * WIDTH, value.to(kept.dtype.element_ty))
        bits = _larger(bits, value)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005  Triton knows no unpacking
    factor, scale = _scales(bits)
    for i in tl.static_range(TILES):
        tl.store(result + at + i * WIDTH, _rounded(values[i], factor))
    tl.store(scales + row, scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gelu_backward(  # type: ignore[no-untyped-def]
    grad, hidden, weight_scale, result, scales, kept, M,
    N: tl.constexpr, KEEP: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, WIDTH)
    at = row[:, None].to(tl.int64) * N + column[None, :]
    bits = tl.zeros((1,), tl.int32)
    values = ()
    for i in tl.static_range(TILES):
        x = tl.load(hidden + at + i * WIDTH).to(tl.float32)
        g = tl.load(grad + at + i * WIDTH).to(tl.float32)
        share, bell = _normal(x)
        g *= share + x * (bell * 0.3989422804014327)
        if KEEP:
            tl.store(kept + at + i * WIDTH, g.to(kept.dtype.element_ty))
        value = g * tl.load(weight_scale + column + i * WIDTH).to(tl.float32)[None, :]
        bits = _larger(bits, value)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    factor, scale = _scales(bits)
    for i in tl.static_range(TILES):
        tl.store(result + at + i * WIDTH, _rounded(values[i], factor))
    tl.store(scales + row, scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rope_of(rope, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """The four numbers of each pair's rotation: [out, in] of 00, 01, 10, 11, each ``[1, HALF]``."""
    first, second = tl.split(tl.reshape(tl.load(rope + tl.arange(0, 4 * HALF)), (HALF, 2, 2)))
    r00, r10 = tl.split(first)
    r01, r11 = tl.split(second)
    return r00[None, :], r01[None, :], r10[None, :], r11[None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _turned(x, r00, r01, r10, r11, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    return tl.reshape(tl.join(r00 * a + r01 * b, r10 * a + r11 * b), (HEADS, 2 * HALF))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _root(x, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """One over the root of each head's mean square. Added to it is float32's epsilon, as torch's RMS norm does."""
    return 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / HEAD + 1.1920928955078125e-07)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate(  # type: ignore[no-untyped-def]
    fused, rope, query_norm, key_norm, query, key,
    tokens, rope_b, HEAD: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    token, d = tl.program_id(0), tl.arange(0, HEAD)
    tile = tl.arange(0, HEADS)[:, None] * HEAD + d[None, :]
    width: tl.constexpr = TILES * HEADS * HEAD
    r00, r01, r10, r11 = _rope_of(rope + (token // tokens) * rope_b + (token % tokens) * 2 * HEAD, HEAD // 2)
    q_norm, k_norm = tl.load(query_norm + d).to(tl.float32), tl.load(key_norm + d).to(tl.float32)
    at = token.to(tl.int64) * width
    for i in tl.static_range(2 * TILES):
        x = tl.load(fused + 3 * at + i * HEADS * HEAD + tile).to(tl.float32)
        y = x * _root(x, HEAD)[:, None]
        if i < TILES:
            y = _turned(y * q_norm[None, :], r00, r01, r10, r11, HEADS, HEAD // 2)
            tl.store(query + at + i * HEADS * HEAD + tile, y.to(query.dtype.element_ty))
        else:
            y = _turned(y * k_norm[None, :], r00, r01, r10, r11, HEADS, HEAD // 2)
            tl.store(key + at + (i - TILES) * HEADS * HEAD + tile, y.to(key.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate_backward(  # type: ignore[no-untyped-def]
    d_query, d_key, d_value, fused, rope, query_norm, key_norm, result,
    tokens, rope_b, HEAD: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    token, d = tl.program_id(0), tl.arange(0, HEAD)
    tile = tl.arange(0, HEADS)[:, None] * HEAD + d[None, :]
    width: tl.constexpr = TILES * HEADS * HEAD
    r00, r01, r10, r11 = _rope_of(rope + (token // tokens) * rope_b + (token % tokens) * 2 * HEAD, HEAD // 2)
    q_norm, k_norm = tl.load(query_norm + d).to(tl.float32), tl.load(key_norm + d).to(tl.float32)
    at = token.to(tl.int64) * width
    for i in tl.static_range(3 * TILES):
        if i < TILES:
            g = tl.load(d_query + at + i * HEADS * HEAD + tile).to(tl.float32)
            g = _turned(g, r00, r10, r01, r11, HEADS, HEAD // 2) * q_norm[None, :]
        elif i < 2 * TILES:
            g = tl.load(d_key + at + (i - TILES) * HEADS * HEAD + tile).to(tl.float32)
            g = _turned(g, r00, r10, r01, r11, HEADS, HEAD // 2) * k_norm[None, :]
        else:
            g = tl.load(d_value + at + (i - 2 * TILES) * HEADS * HEAD + tile).to(tl.float32)
        if i < 2 * TILES:
            x = tl.load(fused + 3 * at + i * HEADS * HEAD + tile).to(tl.float32)
            root = _root(x, HEAD)
            along = tl.sum(g * x, axis=1) / HEAD * root * root
            g = root[:, None] * (g - x * along[:, None])
        tl.store(result + 3 * at + i * HEADS * HEAD + tile, g.to(result.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _float32_linear(  # type: ignore[no-untyped-def]
    x, weight, bias, result, N, K, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    n, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, STEP)
    row = tl.program_id(1)
    total = tl.zeros((COLUMNS, STEP), tl.float32)
    for start in range(0, K, STEP):
        inside = start + k < K
        values = tl.load(x + row * K + start + k, mask=inside, other=0.0)
        at = weight + n[:, None].to(tl.int64) * K + start + k[None, :]
        total += tl.load(at, mask=(n < N)[:, None] & inside[None, :], other=0.0).to(tl.float32) * values[None, :]
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(result + row * N + n, y, mask=n < N)


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear of a few rows in float32, with weights stored in less, which are not copied to float32 first.

    Args:
        x: ``[B, K]`` float32.
        weight: ``[N, K]``.
        bias: ``[N]``.

    Returns:
        ``[B, N]`` float32.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (rows, inner), columns = x.shape, weight.shape[0]
    result = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    launch(_float32_linear, (triton.cdiv(columns, 16), rows, 1), (x, weight, weight if bias is None else bias, result),
           (columns, inner, bias is not None, 16, 512), 4, 3)  # fmt: skip
    return result


def _int8_like(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scales


def gelu_quantize(hidden: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``hidden [M, N]`` after gelu, as int8 with a scale a row; with ``keep`` also in hidden's dtype."""
    hidden = hidden.contiguous()
    (rows, columns), (result, scales) = hidden.shape, _int8_like(hidden)
    kept = torch.empty_like(hidden) if keep else None
    launch(_gelu_quantize, (rows, 1, 1), (hidden, result, scales, hidden if kept is None else kept),
           (rows, columns, keep, *_tiles(columns)), 8, 3)  # fmt: skip
    return result, scales, kept


def gelu_backward(
    grad: Tensor, hidden: Tensor, weight_scale: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient ``[M, N]`` of ``hidden``, times ``weight_scale [N, 1]`` as int8 with a scale a row.

    With ``keep`` also the gradient itself, in its own dtype.
    """
    grad, hidden = grad.contiguous(), hidden.contiguous()
    (rows, columns), (result, scales) = hidden.shape, _int8_like(hidden)
    kept = torch.empty_like(grad) if keep else None
    launch(_gelu_backward, (rows, 1, 1),
           (grad, hidden, weight_scale.contiguous(), result, scales, grad if kept is None else kept),
           (rows, columns, keep, *_tiles(columns)), 4, 3)  # fmt: skip
    return result, scales, kept


def _tiles(columns: int) -> tuple[int, int]:
    tiles = tiles_of(columns)
    assert tiles is not None
    return tiles


def heads_of(heads: int) -> tuple[int, int]:
    """How many heads a tile has, and how many tiles there are."""
    together = min(4, heads & -heads)
    return together, heads // together


def rotate(fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor) -> tuple[Tensor, Tensor]:
    """See ``rotary.rotate``."""
    numbers, tensors = _rotation(fused, rope, query_norm, key_norm)
    batch, tokens, width = fused.shape
    shape = (batch, tokens, width // 3 // query_norm.shape[0], query_norm.shape[0])
    query, key = (torch.empty(shape, dtype=fused.dtype, device=fused.device) for _ in "qk")
    launch(_rotate, (batch * tokens, 1, 1), (*tensors, query, key), numbers, 4, 3)
    return query, key


def rotate_backward(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor
) -> Tensor:
    """See ``rotary.rotate``."""
    numbers, tensors = _rotation(fused, rope, query_norm, key_norm)
    grads = tuple(d.contiguous() for d in (d_query, d_key, d_value))
    result = torch.empty(fused.shape, dtype=fused.dtype, device=fused.device)
    launch(_rotate_backward, (fused.shape[0] * fused.shape[1], 1, 1), (*grads, *tensors, result), numbers, 4, 3)
    return result


def _rotation(*tensors: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    fused, rope, query_norm, _ = tensors = tuple(t.contiguous() for t in tensors)
    head = query_norm.shape[0]
    rope_b = rope[0].numel() if rope.shape[0] > 1 else 0
    return (fused.shape[1], rope_b, head, *heads_of(fused.shape[2] // 3 // head)), tensors
