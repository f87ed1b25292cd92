"""How are queries and keys normalised and rotated? In one kernel each way, between the linear and the attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from k5train.forward.checks import triton_works

_EPSILON = torch.finfo(torch.float32).eps  # torch's RMS norm adds it to the mean square

_library: Any = torch.library.Library("k5", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define("rotate(Tensor fused, Tensor rope, Tensor query_norm, Tensor key_norm) -> (Tensor, Tensor)")

_library.define(
    "rotate_backward(Tensor d_query, Tensor d_key, Tensor d_value, Tensor fused, Tensor rope, Tensor query_norm,"
    " Tensor key_norm) -> Tensor"
)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """In float32, as ``Kandinsky5AttnProcessor``: ``query_norm(query.float()).type_as(query)``."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + _EPSILON)
    return (y * weight.float()).type_as(x)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE on ``[B, N, heads, head]``. diffusers rounds the result to bfloat16, whatever dtype x has."""
    pairs = torch.unflatten(x.float(), -1, (-1, 1, 2))
    return (rope * pairs).sum(dim=-1).flatten(-2, -1).to(torch.bfloat16).type_as(x)


def _rotate(fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, N, heads, head]``, from ``fused``, which one linear made."""
    if _runs(fused, query_norm):
        from k5train.forward import row_kernels

        return row_kernels.rotate(fused, rope, query_norm, key_norm)
    query, key, _ = heads_of(fused, query_norm.shape[0])
    return (
        rotate(rms_norm(query, query_norm), rope).contiguous(),
        rotate(rms_norm(key, key_norm), rope).contiguous(),
    )


def _rotate_backward(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor
) -> Tensor:
    """The gradient of ``fused``. The norms are frozen."""
    if _runs(fused, query_norm):
        from k5train.forward import row_kernels

        return row_kernels.rotate_backward(d_query, d_key, d_value, fused, rope, query_norm, key_norm)
    query, key, _ = heads_of(fused, query_norm.shape[0])
    grads = (_backward(d_query, query, rope, query_norm), _backward(d_key, key, rope, key_norm), d_value)
    return torch.cat([g.flatten(-2, -1) for g in grads], dim=-1)


def _backward(grad: Tensor, x: Tensor, rope: Tensor, norm: Tensor) -> Tensor:
    pairs = torch.unflatten(grad.float(), -1, (-1, 2, 1))
    turned = (rope * pairs).sum(dim=-2).flatten(-2, -1) * norm.float()
    y = x.float()
    root = torch.rsqrt(y.square().mean(-1, keepdim=True) + _EPSILON)
    return (root * (turned - y * root.square() * (turned * y).mean(-1, keepdim=True))).type_as(x)


def heads_of(fused: Tensor, head: int) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[B, N, heads, head]`` as views of ``[B, N, 3 * heads * head]``."""
    return tuple(torch.unflatten(t, -1, (-1, head)) for t in fused.chunk(3, dim=-1))


def _runs(fused: Tensor, norm: Tensor) -> bool:
    head = norm.shape[0]
    is_known = fused.dtype == torch.bfloat16 and head & -head == head >= 32
    return fused.is_cuda and is_known and rotary_works(fused.device)


_library.impl("rotate", _rotate, "CompositeExplicitAutograd")
_library.impl("rotate_backward", _rotate_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("k5::rotate", lib=_library)
def _(fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor) -> tuple[Tensor, Tensor]:
    head = query_norm.shape[0]
    shape = (*fused.shape[:2], fused.shape[2] // 3 // head, head)
    return fused.new_empty(shape), fused.new_empty(shape)


@torch.library.register_fake("k5::rotate_backward", lib=_library)
def _(d_query: Tensor, d_key: Tensor, d_value: Tensor, fused: Tensor, *rest: Tensor) -> Tensor:
    return fused.new_empty(fused.shape)


@functools.cache
def rotary_works(device: torch.device) -> bool:
    """Whether the kernels agree with torch's arithmetic on small cases."""
    return triton_works(device, _agrees)


def _agrees(device: torch.device) -> bool:
    from k5train.forward import row_kernels

    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    for batch, tokens, heads, ropes in ((2, 33, 20, 2), (1, 64, 3, 1)):
        fused = numbers(batch, tokens, 3 * heads * 128).bfloat16()
        grads = [numbers(batch, tokens, heads, 128).bfloat16() for _ in "qkv"]
        rest = (numbers(ropes, tokens, 1, 64, 2, 2), numbers(128).bfloat16(), numbers(128).bfloat16())
        query, key, _ = heads_of(fused, 128)
        pairs = ((query, grads[0], rest[1]), (key, grads[1], rest[2]))
        plain = [rotate(rms_norm(x.float(), norm), rest[0]) for x, _, norm in pairs]
        plain += [_backward(grad, x.float(), rest[0], norm) for x, grad, norm in pairs] + [grads[2]]
        for _ in range(2):  # the first compiles, the second launches directly
            try:
                d_fused = row_kernels.rotate_backward(grads[0], grads[1], grads[2], fused, *rest)
                ours = (*row_kernels.rotate(fused, *rest), *heads_of(d_fused, 128))
            except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                return False
            for a, b in zip(ours, plain, strict=True):
                if not ((a.float() - b.float()).norm() <= 5e-3 * b.float().norm()).item():  # bfloat16: 2e-3
                    return False
    return True


class _Rotated(torch.autograd.Function):
    """Keeps what the linear gave, and not the queries and keys that it makes of it."""

    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(fused, rope, query_norm, key_norm)
        query, key = torch.ops.k5.rotate(fused, rope, query_norm, key_norm)
        return query, key, heads_of(fused, query_norm.shape[0])[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.k5.rotate_backward(*grads, *ctx.saved_tensors), None, None, None


def rotated(fused: Tensor, rope: Tensor, query_norm: Tensor, key_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after RMS norm and RoPE, and values.

    Args:
        fused: ``[B, N, 3 * heads * head]``: what one linear made of the tokens.
        rope: ``[1 or B, N, 1, head / 2, 2, 2]`` float32.
        query_norm: ``[head]``.
        key_norm: ``[head]``.

    Returns:
        three times ``[B, N, heads, head]``; the values are a view of ``fused``.
    """
    out: tuple[Tensor, Tensor, Tensor] = _Rotated.apply(fused, rope, query_norm, key_norm)  # type: ignore[no-untyped-call]
    return out
