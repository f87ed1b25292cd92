"""How is attention over few keys computed? In Triton kernels, for the picture's attention to its caption.

Forward, they serve captions that are padded: how many keys each row has is data, a tensor on the GPU. So captions of
different lengths share a batch, and a captured pass serves every caption. Padding is never read, and its gradient is 0.

Backward, they also serve captions without padding: torch's flash attention gives each program some of the keys, so that
few keys leave most of the card idle, and takes as long for 64 as for 512. Here programs share the keys and each takes
some of the queries. Their sums are added in a fixed order, so the result always has the same bits. An H200 takes 137 us
for 4,096 queries and 256 keys, flash attention 335 and cuDNN 194.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5train.forward.kernels import launch


class Sizes(NamedTuple):
    """How the kernels cut their work, and how Triton compiles them."""

    keys_of_dkv: int
    queries_of_dkv: int
    warps_of_dkv: int
    stages_of_dkv: int
    queries_of_dq: int
    keys_of_dq: int
    warps_of_dq: int
    stages_of_dq: int
    queries_of_forward: int
    keys_of_forward: int
    warps_of_forward: int
    stages_of_forward: int


# By compute capability. Others have 99 KiB of shared memory for a program; with _OTHER_SIZES one takes 72. Timed only
# on an H200, where those take 117 us for 77 keys and 229 for 256.
_SIZES = {
    (9, 0): Sizes(128, 64, 8, 3, 64, 64, 4, 2, 64, 64, 4, 3),
    (8, 0): Sizes(128, 64, 8, 2, 64, 64, 4, 2, 64, 64, 4, 3),
}
_OTHER_SIZES = Sizes(64, 64, 4, 1, 64, 64, 4, 2, 64, 64, 4, 2)
_PROGRAMS = 128  # about as many as a large card has multiprocessors
_MOST_AT_WORK = 2
"""Of padded keys, so many tiles are taken to have work when the queries are divided among programs: a caption is rarely
as long as the longest one, and what is padding returns at once. With it 256 of 512 keys take an H200 180 us; 286 if all
tiles are taken to have work."""


@triton.jit(do_not_specialize=["N", "L"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_forward(  # type: ignore[no-untyped-def]
    lengths, query, key, value, out, logsumexp,
    N, L, heads, scale,
    query_b, query_n, key_b, key_n, value_b, value_n,
    HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    length = tl.load(lengths + batch)
    n, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    inside = (n < N)[:, None]
    q = tl.load(query + batch.to(tl.int64) * query_b + n[:, None] * query_n + head * HEAD + d[None, :],
                mask=inside, other=0.0)  # fmt: skip
    most = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    o = tl.zeros((QUERIES, HEAD), dtype=tl.float32)
    for start in range(0, length, KEYS):
        at = start + tl.arange(0, KEYS)
        k = tl.load(key + batch.to(tl.int64) * key_b + at[:, None] * key_n + head * HEAD + d[None, :],
                    mask=(at < length)[:, None], other=0.0)  # fmt: skip
        v = tl.load(value + batch.to(tl.int64) * value_b + at[:, None] * value_n + head * HEAD + d[None, :],
                    mask=(at < length)[:, None], other=0.0)  # fmt: skip
        s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
        s = tl.where((at < length)[None, :], s, float("-inf"))
        now = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - now[:, None])
        shrink = tl.exp2(most - now)
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None])
        most = now
    plain = batch.to(tl.int64) * N * heads * HEAD + n[:, None] * heads * HEAD + head * HEAD + d[None, :]
    tl.store(out + plain, (o / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(logsumexp + tl.program_id(1) * N + n, (most + tl.log2(total)) * 0.6931471805599453, mask=n < N)


@triton.jit(do_not_specialize=["N", "L"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_dq(  # type: ignore[no-untyped-def]
    lengths, query, key, value, out, grad, logsumexp, delta, d_query,
    N, L, heads, scale,
    query_b, query_n, key_b, key_n, value_b, value_n,
    HAS_LENGTHS: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    length = L
    if HAS_LENGTHS:
        length = tl.load(lengths + batch)
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
    for start in range(0, length, KEYS):
        at = start + tl.arange(0, KEYS)
        k = tl.load(key + batch.to(tl.int64) * key_b + at[:, None] * key_n + head * HEAD + d[None, :],
                    mask=(at < length)[:, None], other=0.0)  # fmt: skip
        v = tl.load(value + batch.to(tl.int64) * value_b + at[:, None] * value_n + head * HEAD + d[None, :],
                    mask=(at < length)[:, None], other=0.0)  # fmt: skip
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634) - lse[:, None])
        p = tl.where((at < length)[None, :], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v)) - total[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(d_query + plain, (dq * scale).to(d_query.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "L", "per_split"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_dkv(  # type: ignore[no-untyped-def]
    lengths, query, key, value, grad, logsumexp, delta, sums,
    N, L, heads, per_split, size, scale,
    query_b, query_n, key_b, key_n, value_b, value_n,
    HAS_LENGTHS: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    at, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD)
    first, length = split * per_split, L
    last = min(first + per_split, N)
    if HAS_LENGTHS:  # where all keys are padding nothing is computed, and the sums are not read
        length = tl.load(lengths + batch)
        last = tl.where(tl.program_id(0) * KEYS < length, last, first)
    inside = (at < length)[:, None]
    k = tl.load(key + batch.to(tl.int64) * key_b + at[:, None] * key_n + head * HEAD + d[None, :],
                mask=inside, other=0.0)  # fmt: skip
    v = tl.load(value + batch.to(tl.int64) * value_b + at[:, None] * value_n + head * HEAD + d[None, :],
                mask=inside, other=0.0)  # fmt: skip
    dk = tl.zeros((KEYS, HEAD), dtype=tl.float32)
    dv = tl.zeros((KEYS, HEAD), dtype=tl.float32)
    for start in range(first, last, QUERIES):
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


@triton.jit(do_not_specialize=["size", "L"])  # type: ignore[untyped-decorator, unused-ignore]
def _few_keys_add(  # type: ignore[no-untyped-def]
    lengths, sums, target, size, batch, L, width,
    HAS_LENGTHS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if HAS_LENGTHS:  # of padding the sums were not written
        row = at // width
        inside = inside & (row % L < tl.load(lengths + row // L % batch, mask=inside, other=0))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    tl.store(target + at, total.to(target.dtype.element_ty), mask=at < size)


def forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, sizes: Sizes | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to the first keys of each row.

    Args:
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        lengths: ``[B]`` int32, 1 to L: so many keys are attended to; the rest is not read.
        sizes: use these and not the table's.

    Returns:
        ``[B, N, heads, head]``, and the log-sum-exp of the scaled products, ``[B, heads, N]`` float32.
    """
    sizes = sizes or _sizes(query.device)
    batch, num_queries, heads, width = query.shape
    query, key, value = (_with_rows(t) for t in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logsumexp = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
    launch(
        _few_keys_forward, (triton.cdiv(num_queries, sizes.queries_of_forward), batch * heads, 1),
        (lengths, query, key, value, out, logsumexp),
        (num_queries, key.shape[1], heads, width**-0.5, *_strides(query, key, value), width,
         sizes.queries_of_forward, sizes.keys_of_forward),
        sizes.warps_of_forward, sizes.stages_of_forward,
    )  # fmt: skip
    return out, logsumexp


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    lengths: Tensor | None = None, sizes: Sizes | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key and value.

    Args:
        grad: ``[B, N, heads, head]`` of the output.
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        out: ``[B, N, heads, head]``.
        logsumexp: ``[B, heads, N]`` float32 of the scaled products, as flash attention gives it.
        lengths: as in ``forward``. The gradients of the other keys and values are 0. None: all L are attended to.
        sizes: use these and not the table's.
    """
    sizes = sizes or _sizes(query.device)
    batch, num_queries, heads, width = query.shape
    num_keys = key.shape[1]
    grad, out, logsumexp = grad.contiguous(), out.contiguous(), logsumexp.contiguous()
    query, key, value = (_with_rows(t) for t in (query, key, value))
    strides = _strides(query, key, value)
    delta, d_query = torch.empty_like(logsumexp), torch.empty_like(out)
    scale = width**-0.5
    has_lengths = lengths is not None
    given = query if lengths is None else lengths  # a pointer that is then never read
    launch(
        _few_keys_dq, (triton.cdiv(num_queries, sizes.queries_of_dq), batch * heads, 1),
        (given, query, key, value, out, grad, logsumexp, delta, d_query),
        (num_queries, num_keys, heads, scale, *strides, has_lengths, width, sizes.queries_of_dq, sizes.keys_of_dq),
        sizes.warps_of_dq, sizes.stages_of_dq,
    )  # fmt: skip
    tiles = triton.cdiv(num_keys, sizes.keys_of_dkv)
    blocks = triton.cdiv(num_queries, sizes.queries_of_dkv)
    at_work = min(_MOST_AT_WORK, triton.cdiv(tiles, 2)) if has_lengths else tiles
    per_split = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // (at_work * batch * heads))))
    splits = triton.cdiv(blocks, per_split)
    shape = (batch, num_keys, heads, width)
    sums = torch.empty(splits, 2, *shape, dtype=torch.float32, device=query.device)
    size = sums[0, 0].numel()
    launch(
        _few_keys_dkv, (tiles, splits, batch * heads), (given, query, key, value, grad, logsumexp, delta, sums),
        (num_queries, num_keys, heads, per_split * sizes.queries_of_dkv, size, scale, *strides,
         has_lengths, width, sizes.queries_of_dkv, sizes.keys_of_dkv),
        sizes.warps_of_dkv, sizes.stages_of_dkv,
    )  # fmt: skip
    both = torch.empty(2, *shape, dtype=query.dtype, device=query.device)
    launch(
        _few_keys_add, (triton.cdiv(2 * size, 2048), 1, 1), (given, sums, both),
        (2 * size, batch, num_keys, heads * width, has_lengths, splits, 2048), 4, 3,
    )  # fmt: skip
    d_key, d_value = both.unbind()
    return d_query, d_key, d_value


def _sizes(device: torch.device) -> Sizes:
    return _SIZES.get(torch.cuda.get_device_capability(device), _OTHER_SIZES)


def _with_rows(tensor: Tensor) -> Tensor:
    """The same, with the heads of a token side by side."""
    return tensor if tensor.stride()[2:] == (tensor.shape[-1], 1) else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """From one row of the batch and from one token to the next."""
    return tuple(t.stride(i) for t in tensors for i in (0, 1))
