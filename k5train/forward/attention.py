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
from k5train.forward.ops import triton_works

_aten: Any = torch.ops.aten
_library: Any = torch.library.Library("k5", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define("attention(Tensor query, Tensor key, Tensor value, bool cudnn) -> (Tensor, Tensor)")

_library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, bool cudnn)"
    " -> (Tensor, Tensor, Tensor)"
)


def _attention(query: Tensor, key: Tensor, value: Tensor, cudnn: bool) -> tuple[Tensor, Tensor]:
    """Output ``[B, N, heads, head]`` and its log-sum-exp, from the kernel that torch has for the device."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if not query.is_cuda:
        results = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif cudnn:
        results = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        results = _aten._scaled_dot_product_flash_attention(query, key, value)
    return results[0].transpose(1, 2).contiguous(), results[1].contiguous()


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cudnn: bool
) -> tuple[Tensor, ...]:
    sizes, on_gpu = (query.shape[1], key.shape[1]), query.is_cuda
    if on_gpu and not cudnn and _has_few_keys(query, key) and few_keys_work(query.device):
        from k5train.forward import few_keys

        return few_keys.backward(grad, query, key, value, out, logsumexp)
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
    """Whether the kernels for few keys agree with plain attention on small cases."""
    return triton_works(device, _few_keys_agree)


def _few_keys_agree(device: torch.device) -> bool:
    from k5train.forward import few_keys

    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    for batch, num_queries, num_keys in ((2, 500, 77), (1, 1024, 256)):
        query, grad = numbers(batch, num_queries, 2, 128), numbers(batch, num_queries, 2, 128)
        fused = numbers(batch, num_keys, 4, 128)  # as a block has them: keys and values are parts of one tensor
        leaves = [t.requires_grad_() for t in (query, *fused.chunk(2, dim=2))]
        with torch.enable_grad():
            plain = torch.autograd.grad(_plain(*leaves), leaves, grad.float())
        query, key, value = (t.detach() for t in leaves)
        products = query.float().transpose(1, 2) @ key.float().permute(0, 2, 3, 1) / 128**0.5
        logsumexp, out = products.logsumexp(-1), _plain(query, key, value).bfloat16()
        for _ in range(2):  # the first compiles, the second launches directly
            try:
                ours = few_keys.backward(grad, query, key, value, out, logsumexp)
            except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                return False
            if not all(_is_close(a, b) for a, b in zip(ours, plain, strict=True)):
                return False
    return True


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("k5::attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, cudnn: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    ending = (1,) if cudnn and query.is_cuda else ()
    return query.new_empty(query.shape), query.new_empty(batch, heads, tokens, *ending, dtype=torch.float32)


@torch.library.register_fake("k5::attention_backward", lib=_library)
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cudnn: bool) -> Tensor:
        out, logsumexp = torch.ops.k5.attention(query, key, value, cudnn)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.cudnn = cudnn
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.k5.attention_backward(grads[0], *ctx.saved_tensors, ctx.cudnn), None)


def attention(query: Tensor, key: Tensor, value: Tensor, cudnn: bool) -> Tensor:
    """Scaled dot product attention without mask and dropout.

    Args:
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        cudnn: use cuDNN's kernel, not flash attention's. The CPU has only one.

    Returns:
        ``[B, N, heads, head]``, contiguous.
    """
    out: Tensor = _Attention.apply(query, key, value, cudnn)  # type: ignore[no-untyped-call]
    return out


def fits(query: Tensor) -> bool:
    """Whether ``attention`` takes these heads: on a GPU, bfloat16 with a width that is a multiple of 8."""
    return not query.is_cuda or (query.dtype == torch.bfloat16 and query.shape[-1] % 8 == 0)


@functools.cache
def attention_works(device: torch.device, cudnn: bool) -> bool:
    """Whether ``attention`` agrees with plain attention, forward and backward, on a small case in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, 256, 2, 128), (1, 77, 2, 128), (1, 77, 2, 128))
    inputs = [torch.randn(s, device=device, dtype=torch.bfloat16, generator=generator) for s in shapes]
    results = []
    for run in (functools.partial(attention, cudnn=cudnn), _plain):
        leaves = [t.clone().requires_grad_() for t in inputs]
        try:
            out = run(*leaves)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        except torch.OutOfMemoryError:  # says nothing about the kernel
            raise
        except RuntimeError:  # no kernel for this GPU, shape or torch
            return False
    return all(_is_close(ours, plain) for ours, plain in zip(*results, strict=True))


def _plain(*inputs: Tensor) -> Tensor:
    query, key, value = (t.float().transpose(1, 2) for t in inputs)
    return (torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1) @ value).transpose(1, 2)


def _is_close(ours: Tensor, plain: Tensor) -> bool:
    return ((ours.float() - plain.float()).norm() <= 2e-2 * plain.float().norm()).item() is True


def any_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with a mask or in any dtype, as diffusers' native backend computes it.

    Args:
        query: ``[B, N, heads, head]``.
        key: ``[B, L, heads, head]``.
        value: ``[B, L, heads, head]``.
        mask: ``[B, 1, 1, L]`` bool, True: attended to. None: everything is.
    """
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
