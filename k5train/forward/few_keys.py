"""How is attention over few keys differentiated? In Triton kernels, for the picture's attention to its caption.

torch's flash attention gives each program some of the keys, so that few keys leave most of the card idle: it takes as
long for 64 as for 512. Here programs share the keys and each takes some of the queries. Their sums are added in a fixed
order, so the result always has the same bits. An H200 takes 137 us for 4,096 queries and 256 keys, flash attention 335
and cuDNN 194.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5train.forward.kernels import launch


class Sizes(NamedTuple):
    """How the two kernels cut their work, and how Triton compiles them."""

    keys_of_dkv: int
    queries_of_dkv: int
    warps_of_dkv: int
    stages_of_dkv: int
    queries_of_dq: int
    keys_of_dq: int
    warps_of_dq: int
    stages_of_dq: int


# By compute capability. Others have 99 KiB of shared memory for a program; with _OTHER_SIZES one takes 72. Timed only
# on an H200, where those take 117 us for 77 keys and 229 for 256.
_SIZES = {(9, 0): Sizes(128, 64, 8, 3, 64, 64, 4, 2), (8, 0): Sizes(128, 64, 8, 2, 64, 64, 4, 2)}
_OTHER_SIZES = Sizes(64, 64, 4, 1, 64, 64, 4, 2)
_PROGRAMS = 128  # about as many as a large card has multiprocessors


@triton.jit(do_not_specialize=["N", "L"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_dq(  # type: ignore[no-untyped-def]
    query, key, value, out, grad, logsumexp, delta, d_query,
    N, L, heads, scale,
    query_b, query_n, key_b, key_n, value_b, value_n,
    HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    n, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    inside = (n < N)[:, None]
    plain = batch.to(tl.int64) * N * heads * HEAD + n[:, None] * heads * HEAD + head * HEAD + d[None, :]
    q = tl.load(query + batch.to(tl.int64) * query_b + n[:, None] * query_n + head * HEAD + d[None, :],
                mask=inside, other=0.0)  # fmt: skip
    g = tl.load(grad + plain, mask=inside, other=0.0)
    o = tl.load(out + plain, mask=inside, other=0.0)
    row = tl.program_id(1) * N + n
    lse = tl.load(logsumexp + row, mask=n < N, other=0.0) * 1.4426950408889634
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + row, total, mask=n < N)
    dq = tl.zeros((QUERIES, HEAD), dtype=tl.float32)
    for start in range(0, L, KEYS):
        at = start + tl.arange(0, KEYS)
        k = tl.load(key + batch.to(tl.int64) * key_b + at[:, None] * key_n + head * HEAD + d[None, :],
                    mask=(at < L)[:, None], other=0.0)  # fmt: skip
        v = tl.load(value + batch.to(tl.int64) * value_b + at[:, None] * value_n + head * HEAD + d[None, :],
                    mask=(at < L)[:, None], other=0.0)  # fmt: skip
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634) - lse[:, None])
        p = tl.where((at < L)[None, :], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v)) - total[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(d_query + plain, (dq * scale).to(d_query.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "L", "per_split"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_dkv(  # type: ignore[no-untyped-def]
    query, key, value, grad, logsumexp, delta, sums,
    N, L, heads, per_split, size, scale,
    query_b, query_n, key_b, key_n, value_b, value_n,
    HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    at, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD)
    inside = (at < L)[:, None]
    k = tl.load(key + batch.to(tl.int64) * key_b + at[:, None] * key_n + head * HEAD + d[None, :],
                mask=inside, other=0.0)  # fmt: skip
    v = tl.load(value + batch.to(tl.int64) * value_b + at[:, None] * value_n + head * HEAD + d[None, :],
                mask=inside, other=0.0)  # fmt: skip
    dk = tl.zeros((KEYS, HEAD), dtype=tl.float32)
    dv = tl.zeros((KEYS, HEAD), dtype=tl.float32)
    for start in range(split * per_split, min((split + 1) * per_split, N), QUERIES):
        n = start + tl.arange(0, QUERIES)
        q = tl.load(query + batch.to(tl.int64) * query_b + n[:, None] * query_n + head * HEAD + d[None, :],
                    mask=(n < N)[:, None], other=0.0)  # fmt: skip
        g = tl.load(grad + batch.to(tl.int64) * N * heads * HEAD + n[:, None] * heads * HEAD + head * HEAD + d[None, :],
                    mask=(n < N)[:, None], other=0.0)  # fmt: skip
        row = tl.program_id(2) * N + n
        lse = tl.load(logsumexp + row, mask=n < N, other=0.0) * 1.4426950408889634
        total = tl.load(delta + row, mask=n < N, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * 1.4426950408889634) - lse[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv)
        ds = p * (tl.dot(v, tl.trans(g)) - total[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    to = split.to(tl.int64) * 2 * size + (batch * L + at[:, None]) * heads * HEAD + head * HEAD + d[None, :]
    tl.store(sums + to, dk * scale, mask=inside)
    tl.store(sums + size + to, dv, mask=inside)


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_add(sums, target, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(target + at, total.to(target.dtype.element_ty), mask=at < size)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, sizes: Sizes | None = None
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value.

    Args:
        grad: ``[B, N, heads, head]`` of the output.
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        out: ``[B, N, heads, head]``.
        logsumexp: ``[B, heads, N]`` float32 of the scaled products, as flash attention gives it.
        sizes: use these and not the table's.
    """
    if sizes is None:
        sizes = _SIZES.get(torch.cuda.get_device_capability(query.device), _OTHER_SIZES)
    batch, num_queries, heads, width = query.shape
    num_keys = key.shape[1]
    grad, out, logsumexp = grad.contiguous(), out.contiguous(), logsumexp.contiguous()
    query, key, value = (t if t.stride()[2:] == (width, 1) else t.contiguous() for t in (query, key, value))
    strides = tuple(t.stride(i) for t in (query, key, value) for i in (0, 1))
    delta, d_query = torch.empty_like(logsumexp), torch.empty_like(out)
    scale = width**-0.5
    launch(
        _few_keys_dq, (triton.cdiv(num_queries, sizes.queries_of_dq), batch * heads, 1),
        (query, key, value, out, grad, logsumexp, delta, d_query),
        (num_queries, num_keys, heads, scale, *strides, width, sizes.queries_of_dq, sizes.keys_of_dq),
        sizes.warps_of_dq, sizes.stages_of_dq,
    )  # fmt: skip
    tiles = triton.cdiv(num_keys, sizes.keys_of_dkv)
    blocks = triton.cdiv(num_queries, sizes.queries_of_dkv)
    per_split = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // (tiles * batch * heads))))
    splits = triton.cdiv(blocks, per_split)
    shape = (batch, num_keys, heads, width)
    sums = torch.empty(splits, 2, *shape, dtype=torch.float32, device=query.device)
    size = sums[0, 0].numel()
    launch(
        _few_keys_dkv, (tiles, splits, batch * heads), (query, key, value, grad, logsumexp, delta, sums),
        (num_queries, num_keys, heads, per_split * sizes.queries_of_dkv, size, scale, *strides,
         width, sizes.queries_of_dkv, sizes.keys_of_dkv),
        sizes.warps_of_dkv, sizes.stages_of_dkv,
    )  # fmt: skip
    both = torch.empty(2, *shape, dtype=query.dtype, device=query.device)
    launch(_few_keys_add, (triton.cdiv(2 * size, 2048), 1, 1), (sums, both), (2 * size, splits, 2048), 4, 3)
    d_key, d_value = both.unbind()
    return d_query, d_key, d_value
