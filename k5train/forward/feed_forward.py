"""How is a feed-forward multiplied on int8 tensor cores? As one function, in which gelu is a part of the quantising.

So each erf is computed once, where the compiler's own kernels compute it twice.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k5train.forward.checks import triton_works
from k5train.forward.ops import adapter_grads, quantize_rows

_library: Any = torch.library.Library("k5", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define("gelu_quantize(Tensor hidden, bool keep) -> (Tensor, Tensor, Tensor)")

_library.define("gelu_backward(Tensor grad, Tensor hidden, Tensor weight_scale, bool keep) -> (Tensor, Tensor, Tensor)")


def _gelu_quantize(hidden: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """gelu of ``hidden [M, N]`` as int8, its scales ``[M, 1]``, and itself, which is empty without ``keep``."""
    if _runs(hidden):
        from k5train.forward import row_kernels

        result, scales, kept = row_kernels.gelu_quantize(hidden, keep)
        return result, scales, hidden.new_empty(0) if kept is None else kept
    activated = F.gelu(hidden)
    return (*quantize_rows(activated), activated if keep else hidden.new_empty(0))


def _gelu_backward(grad: Tensor, hidden: Tensor, weight_scale: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``hidden``: times ``weight_scale [N, 1]`` as int8, its scales, and itself if ``keep``.

    The int8 matmul sums over the rows of the weight, so their scales are multiplied in before.
    """
    if _runs(hidden):
        from k5train.forward import row_kernels

        result, scales, kept = row_kernels.gelu_backward(grad, hidden, weight_scale, keep)
        return result, scales, grad.new_empty(0) if kept is None else kept
    grad = torch.ops.aten.gelu_backward(grad, hidden)
    return (*quantize_rows(grad.float() * weight_scale.float().t()), grad if keep else grad.new_empty(0))


def _runs(hidden: Tensor) -> bool:
    if not hidden.is_cuda or not gelu_works(hidden.device):
        return False
    from k5train.forward import row_kernels

    return row_kernels.tiles_of(hidden.shape[1]) is not None


_library.impl("gelu_quantize", _gelu_quantize, "CompositeExplicitAutograd")
_library.impl("gelu_backward", _gelu_backward, "CompositeExplicitAutograd")


def _shapes(x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(x.shape) if keep else x.new_empty(0)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32), kept


@torch.library.register_fake("k5::gelu_quantize", lib=_library)
def _(hidden: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(hidden, keep)


@torch.library.register_fake("k5::gelu_backward", lib=_library)
def _(grad: Tensor, hidden: Tensor, weight_scale: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(grad, keep)


@functools.cache
def gelu_works(device: torch.device) -> bool:
    """Whether the kernels for gelu agree with torch's on small cases, up to the last step of an int8 now and then."""
    return triton_works(device, _gelu_agrees)


def _gelu_agrees(device: torch.device) -> bool:
    from k5train.forward import row_kernels

    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    for rows, columns in ((5, 640), (64, 10240)):
        hidden, grad, scale = numbers(rows, columns), numbers(rows, columns), numbers(columns, 1).abs()
        plain = hidden.float().requires_grad_()
        with torch.enable_grad():
            activated = F.gelu(plain)
            (d_hidden,) = torch.autograd.grad(activated, plain, grad.float())
        expected = (
            (*quantize_rows(activated.detach()), activated.detach()),
            (*quantize_rows(d_hidden * scale.float().t()), d_hidden),
        )
        for _ in range(2):  # the first compiles, the second launches directly
            try:
                ours = (
                    row_kernels.gelu_quantize(hidden, True),
                    row_kernels.gelu_backward(grad, hidden, scale, True),
                )
            except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                return False
            if not all(_agree(a, b) for a, b in zip(ours, expected, strict=True)):
                return False
    return True


def _agree(ours: Any, plain: Any) -> bool:
    """Whether the int8 are off by one in at most a thousandth, and the rest only by rounding."""
    off = (ours[0].int() - plain[0].int()).abs()
    is_near = (off.max() <= 1) & (off.float().mean() <= 1e-3)
    is_near &= ((ours[1] - plain[1]).abs() <= 1e-6 * plain[1]).all()
    is_near &= (ours[2].float() - plain[2]).norm() <= 5e-3 * plain[2].norm()  # bfloat16: 2e-3
    return bool(is_near.item())


class Part(NamedTuple):
    """One of the two linears: int8, with its adapter."""

    weight: Tensor
    """``[N, K]``."""
    scale: Tensor
    """``[N, 1]``."""
    bias: Tensor | None
    down: Tensor | None
    """``[R, K]`` in the compute dtype, already times alpha / rank. None: no adapter."""
    up: Tensor | None
    """``[N, R]``."""


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor | None) -> Tensor:
        first, second = Part(*parts[:5]), Part(*parts[5:])  # type: ignore[arg-type]
        z1 = None if first.down is None else x @ first.down.t()
        a, a_scale = quantize_rows(x)
        hidden = _matmul(a, a_scale, first, z1, x.dtype, "ff_in")
        a, a_scale, kept = torch.ops.k5.gelu_quantize(hidden, second.down is not None)
        z2 = None if second.down is None else kept @ second.down.t()
        ctx.save_for_backward(None if first.down is None else x, hidden, z1, z2, *parts)
        return _matmul(a, a_scale, second, z2, x.dtype, "ff_out")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, z1, z2, *parts = ctx.saved_tensors
        first, second, g = Part(*parts[:5]), Part(*parts[5:]), grads[0]
        dz = d_down2 = d_up2 = d_down1 = d_up1 = None
        if second.down is not None:
            dz, d_down2, d_up2 = adapter_grads(g, F.gelu(hidden), second.up, z2, 1)
        a, a_scale = quantize_rows(g.float() * second.scale.float().t())
        g = _matmul_backward(a, a_scale, second, dz, g.dtype)
        a, a_scale, kept = torch.ops.k5.gelu_backward(g, hidden, first.scale, first.down is not None)
        dz = None
        if first.down is not None:
            dz, d_down1, d_up1 = adapter_grads(kept, x, first.up, z1, 1)
        dx = _matmul_backward(a, a_scale, first, dz, g.dtype)
        return dx, None, None, None, d_down1, d_up1, None, None, None, d_down2, d_up2


def _matmul(a: Tensor, a_scale: Tensor, part: Part, z: Tensor | None, dtype: torch.dtype, tag: str) -> Tensor:
    out: Tensor = torch.ops.k5.int8_matmul(
        a, a_scale, part.weight, part.scale, part.bias, z, part.up, 1, dtype, False, tag
    )
    return out


def _matmul_backward(a: Tensor, a_scale: Tensor, part: Part, dz: Tensor | None, dtype: torch.dtype) -> Tensor:
    down = None if part.down is None else part.down.t()
    out: Tensor = torch.ops.k5.int8_matmul(a, a_scale, part.weight, None, None, dz, down, 1, dtype, True, "backward")
    return out


def feed_forward(x: Tensor, first: Part, second: Part) -> Tensor:
    """``second(gelu(first(x)))``, both multiplied on int8 tensor cores.

    Args:
        x: ``[..., K]`` in the compute dtype.

    Returns:
        ``[..., N]``.
    """
    out: Tensor = _FeedForward.apply(x.reshape(-1, x.shape[-1]), *first, *second)  # type: ignore[no-untyped-call]
    return out.reshape(*x.shape[:-1], out.shape[-1])
