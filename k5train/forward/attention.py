"""How is attention computed? As ops of our own, which draw no random numbers and so can be cached when compiled.

torch marks its fused attentions as random, because they can do dropout. If one is computed again in the backward pass,
the compiler saves and restores the generator's state around it, in every block of every step, and does not cache the
compiled code: every start compiled such blocks again, 9 s a level on an H100.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k5cache.shared.device import is_rocm
from k5train.forward.checks import triton_works

_aten: Any = torch.ops.aten
_library: Any = torch.library.Library("k5", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define("attention(Tensor query, Tensor key, Tensor value, Tensor? lengths, bool cudnn) -> (Tensor, Tensor)")

_library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp,"
    " Tensor? lengths, bool cudnn) -> (Tensor, Tensor, Tensor)"
)


def _attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cudnn: bool) -> tuple[Tensor, Tensor]:
    """Output ``[B, N, heads, head]`` and its log-sum-exp, from the kernel that torch has for the device. For padded
    captions it is one of ours."""
    if lengths is not None:
        from k5train.forward import few_keys

        return few_keys.forward(query, key, value, lengths)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if not query.is_cuda:
        results = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif cudnn:
        results = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        results = _aten._scaled_dot_product_flash_attention(query, key, value)
    return results[0].transpose(1, 2).contiguous(), results[1].contiguous()


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, lengths: Tensor | None,
    cudnn: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    sizes, on_gpu = (query.shape[1], key.shape[1]), query.is_cuda
    are_few = on_gpu and not cudnn and _has_few_keys(query, key) and few_keys_work(query.device)
    if are_few or lengths is not None:
        from k5train.forward import few_keys

        return few_keys.backward(grad, query, key, value, out, logsumexp, lengths)
    tensors = [t.transpose(1, 2) for t in (grad.contiguous(), query, key, value, out)]
    if not on_gpu:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, logsumexp, 0.0, False)
    else:
        # The generator's state, read only for dropout.
        none = query.new_empty(2, dtype=torch.int64 if is_rocm() else torch.uint64)
        if cudnn:
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                *tensors, logsumexp, none, none, None, None, None, *sizes, 0.0, False
            )
        else:
            grads = _aten._scaled_dot_product_flash_attention_backward(
                *tensors, logsumexp, None, None, *sizes, 0.0, False, none, none
            )
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


_MOST_KEYS = 512  # about where flash attention becomes as fast


def _has_few_keys(query: Tensor, key: Tensor) -> bool:
    """Whether ``few_keys.backward`` is meant for these sizes."""
    return key.shape[1] <= min(_MOST_KEYS, query.shape[1] // 2) and query.shape[-1] == 128


@functools.cache
def few_keys_work(device: torch.device) -> bool:
    """Whether the backward kernels for few keys, all of which count, agree with plain attention on small cases."""
    return triton_works(device, _few_keys_agree)


@functools.cache
def lengths_work(device: torch.device) -> bool:
    """Whether the kernels with a length for each row, forward and backward, agree with it."""
    return triton_works(device, _lengths_agree)


def _few_keys_agree(device: torch.device) -> bool:
    return all(_agrees(device, *case, None) for case in ((500, 77), (1024, 256)))


def _lengths_agree(device: torch.device) -> bool:
    return all(_agrees(device, *case) for case in ((500, 300, (77, 300)), (150, 150, (1, 20))))


def _agrees(device: torch.device, num_queries: int, num_keys: int, given: tuple[int, ...] | None) -> bool:
    """Whether the kernels agree with plain attention on random numbers.

    Args:
        given: the lengths of the rows. None: all keys count.
    """
    from k5train.forward import few_keys

    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    batch = len(given or (1, 1))
    query, grad = numbers(batch, num_queries, 2, 128), numbers(batch, num_queries, 2, 128)
    fused = numbers(batch, num_keys, 4, 128)  # as a block has them: keys and values are parts of one tensor
    query, key, value = leaves = [t.requires_grad_() for t in (query, *fused.chunk(2, dim=2))]
    lengths = None if given is None else torch.tensor(given, device=device, dtype=torch.int32)
    with torch.enable_grad():
        plain_out, logsumexp = _plain(query, key, value, lengths)
        plain = torch.autograd.grad(plain_out, leaves, grad.float())
    query, key, value = (t.detach() for t in leaves)
    out, logsumexp = plain_out.detach().bfloat16(), logsumexp.detach()
    if lengths is not None:  # padding is never read
        padding = ~length_mask(lengths, num_keys).reshape(batch, num_keys, 1, 1)
        key, value = (t.masked_fill(padding, float("nan")) for t in (key, value))
    for _ in range(2):  # the first compiles, the second launches directly
        try:
            ours = few_keys.backward(grad, query, key, value, out, logsumexp, lengths)
            forward = () if lengths is None else few_keys.forward(query, key, value, lengths)
        except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
            return False
        expected = (*plain, plain_out, logsumexp)
        if not all(_is_close(a, b) for a, b in zip((*ours, *forward), expected, strict=False)):
            return False
    return True


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("k5::attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cudnn: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    ending = (1,) if cudnn and query.is_cuda and lengths is None else ()
    return query.new_empty(query.shape), query.new_empty(batch, heads, tokens, *ending, dtype=torch.float32)


@torch.library.register_fake("k5::attention_backward", lib=_library)
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cudnn: bool) -> Tensor:
        out, logsumexp = torch.ops.k5.attention(query, key, value, lengths, cudnn)
        ctx.save_for_backward(query, key, value, out, logsumexp, lengths)
        ctx.cudnn = cudnn
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.k5.attention_backward(grads[0], *ctx.saved_tensors, ctx.cudnn), None, None)


def attention(query: Tensor, key: Tensor, value: Tensor, cudnn: bool, lengths: Tensor | None = None) -> Tensor:
    """Scaled dot product attention without dropout, to all keys or to the first of each row.

    Args:
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        cudnn: use cuDNN's kernel, not flash attention's. The CPU has only one.
        lengths: ``[B]`` int32, 1 to L, on the same GPU: so many keys are attended to. The rest is not read, and its
            gradient is 0. Needs ``fits_padded``. None: all L are.

    Returns:
        ``[B, N, heads, head]``, contiguous.
    """
    out: Tensor = _Attention.apply(query, key, value, lengths, cudnn)  # type: ignore[no-untyped-call]
    return out


def fits(query: Tensor) -> bool:
    """Whether ``attention`` takes these heads: on a GPU, bfloat16 with a width that is a multiple of 8."""
    return not query.is_cuda or (query.dtype == torch.bfloat16 and query.shape[-1] % 8 == 0)


def fits_padded(query: Tensor) -> bool:
    """Whether ``attention`` takes these heads with ``lengths``, where ``lengths_work``."""
    return query.is_cuda and query.dtype == torch.bfloat16 and query.shape[-1] == 128


@functools.cache
def attention_works(device: torch.device, cudnn: bool) -> bool:
    """Whether ``attention`` agrees with plain attention, forward and backward, on a small case in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, 256, 2, 128), (1, 77, 2, 128), (1, 77, 2, 128))
    inputs = [torch.randn(s, device=device, dtype=torch.bfloat16, generator=generator) for s in shapes]
    results = []
    for run in (functools.partial(attention, cudnn=cudnn), _plain_out):
        leaves = [t.clone().requires_grad_() for t in inputs]
        try:
            out = run(*leaves)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        except torch.OutOfMemoryError:  # says nothing about the kernel
            raise
        except RuntimeError:  # no kernel for this GPU, shape or torch
            return False
    return all(_is_close(ours, plain) for ours, plain in zip(*results, strict=True))


def _plain(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, in float32 and written out."""
    query, key, value = (t.float().transpose(1, 2) for t in (query, key, value))
    products = query @ key.mT / query.shape[-1] ** 0.5
    if lengths is not None:
        products = products.masked_fill(~length_mask(lengths, key.shape[2]), float("-inf"))
    return (torch.softmax(products, -1) @ value).transpose(1, 2), products.logsumexp(-1)


def _plain_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _plain(query, key, value)[0]


def _is_close(ours: Tensor, plain: Tensor) -> bool:
    return ((ours.float() - plain.float()).norm() <= 2e-2 * plain.float().norm()).item() is True


def length_mask(lengths: Tensor, num_tokens: int) -> Tensor:
    """``[B, 1, 1, num_tokens]`` bool for attention over ``[B, heads, queries, keys]``: the first tokens of each row.

    The lengths are not read on the host, so that a captured pass can have other ones each time.
    """
    return (torch.arange(num_tokens, device=lengths.device) < lengths[:, None])[:, None, None]


def any_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    """Attention to the first keys of each row, or in any dtype, as diffusers' native backend computes it.

    Args:
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        lengths: ``[B]`` int32, 1 to L: so many keys are attended to. None: all of them.
    """
    mask = None if lengths is None else length_mask(lengths, key.shape[1])
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
