"""How is a frozen linear with its LoRA multiplied? Linears that share an input take one matmul, with the LoRA inside.

It saves for the backward pass only what that needs. The matmuls are ops of our own (``torch.ops.k5``). So a level of
``planning/memory.py`` can name them, and ``torch.compile`` fuses what is around them: the quantisation of an input
becomes part of the norm before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from k5cache.shared.device import is_rocm
from k5train.forward.checks import exact, hopper_agrees, matmul_agrees, scaling_agrees, triton_works

_library: Any = torch.library.Library("k5", "DEF")  # type: ignore[no-untyped-call]

_library.define(
    "matmul(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? z, Tensor? up, int segments, str tag)"
    " -> Tensor"
)

_library.define("matmul_backward(Tensor g, Tensor weight, Tensor? scale, Tensor? dz, Tensor? down) -> Tensor")

_library.define(
    "int8_matmul(Tensor a, Tensor a_scale, Tensor b, Tensor? b_scale, Tensor? bias, Tensor? z, Tensor? up,"
    " int segments, ScalarType dtype, bool transpose_b, str tag) -> Tensor"
)


def _matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    segments: int,
    tag: str,
) -> Tensor:
    """``x @ (scale * weight).T + bias``, and to segment i of the columns ``z_i @ up_i.T``.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``, in x's dtype, or int8 with ``scale [N, 1]``.
        z: ``[M, segments * R]``: x after the adapters' down-projections.
        up: ``[N, R]``: the up-projections, one below the other.
        tag: the matmul's name in a level of ``planning/memory.py``.
    """
    weight = _scaled(weight, scale).t()
    out = x @ weight if bias is None else torch.addmm(bias, x, weight)
    if z is not None and up is not None:
        columns, rank = out.shape[1] // segments, up.shape[1]
        for i in range(segments):
            part = slice(i * columns, (i + 1) * columns)
            out[:, part].addmm_(z[:, i * rank : (i + 1) * rank], up[part].t())
    return out


_workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _workspace(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Room for a weight in the form that a matmul needs, always the same memory: matmuls of a stream run in sequence.

    A new tensor each time would be freed between activations that stay, which left holes: 0.9 of 16 GiB on an H200.
    """
    workspace = _workspaces.get((like.device, dtype))
    if workspace is None or workspace.numel() < like.numel():
        workspace = _workspaces[like.device, dtype] = torch.empty(like.numel(), dtype=dtype, device=like.device)
    return workspace[: like.numel()].view(shape)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return weight
    if not weight.is_cuda:
        return scale * weight
    target = _workspace(weight, scale.dtype, *weight.shape)
    if not scaling_works(weight.device):
        return torch.mul(scale, weight, out=target)
    from k5train.forward.kernels import scale_rows

    return scale_rows(weight, scale, target)


def _transposed(weight: Tensor) -> Tensor:
    """``[K, N]`` int8 as a contiguous ``[N, K]``."""
    if not (weight.is_cuda and kernel_works(weight.device)):
        return weight.t().contiguous()
    from k5train.forward.kernels import transpose

    return transpose(weight, _workspace(weight, weight.dtype, weight.shape[1], weight.shape[0]))


def _matmul_backward(g: Tensor, weight: Tensor, scale: Tensor | None, dz: Tensor | None, down: Tensor | None) -> Tensor:
    """``g @ (scale * weight) + dz @ down``: the gradient of x.

    It is an op of its own so that the compiler does not keep ``scale * weight``.
    """
    out = g @ _scaled(weight, scale)
    return out if dz is None or down is None else out.addmm_(dz, down)


def _int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    segments: int,
    dtype: torch.dtype,
    transpose_b: bool,
    tag: str,
) -> Tensor:
    """``(a @ b.T) * a_scale * b_scale.T + bias``, and to segment i of the columns ``z_i @ up_i.T``.

    Args:
        a: ``[M, K]`` int8.
        a_scale: ``[M, 1]`` float32.
        b: ``[N, K]`` int8.
        b_scale: ``[N, 1]``.
        dtype: of the result.
        transpose_b: b is given as ``[K, N]``. int8 tensor cores need both operands along K, so b is transposed for
            the moment of the matmul. It happens in here because the compiler would keep a transposed weight.
    """
    b = _transposed(b) if transpose_b else b
    if a.is_cuda and kernel_works(a.device) and parts_into_tiles(b.shape[0], segments):
        a, b = a.contiguous(), b.contiguous()
        if hopper_works(a.device):
            from k5train.forward import hopper

            if hopper.takes(a, b, z, segments):
                return hopper.int8_matmul(a, a_scale, b, b_scale, bias, z, up, dtype)
        from k5train.forward.kernels import int8_matmul

        return int8_matmul(a, a_scale, b, b_scale, bias, z, up, segments, dtype)
    return exact(a, a_scale, b, b_scale, bias, z, up, segments).to(dtype)


def parts_into_tiles(columns: int, segments: int) -> bool:
    """Whether no tile of the kernel, of 16 columns at least, spans two adapters. None does at published sizes."""
    return segments == 1 or columns // segments % 16 == 0


_library.impl("matmul", _matmul, "CompositeExplicitAutograd")
_library.impl("matmul_backward", _matmul_backward, "CompositeExplicitAutograd")
_library.impl("int8_matmul", _int8_matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("k5::matmul", lib=_library)
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("k5::matmul_backward", lib=_library)
def _(g: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return g.new_empty(g.shape[0], weight.shape[1])


@torch.library.register_fake("k5::int8_matmul", lib=_library)
def _(a: Tensor, a_scale: Tensor, b: Tensor, *rest: Any) -> Tensor:
    dtype, transpose_b = rest[-3:-1]
    return a.new_empty(a.shape[0], b.shape[1 if transpose_b else 0], dtype=dtype)


@functools.cache
def kernel_works(device: torch.device) -> bool:
    """Whether the int8 matmul agrees with exact arithmetic, in every form that is used, on small cases."""
    return triton_works(device, matmul_agrees)


@functools.cache
def hopper_works(device: torch.device) -> bool:
    """Whether this is a Hopper GPU, on which the int8 matmul made for it agrees with exact arithmetic."""
    is_hopper = not is_rocm() and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and triton_works(device, hopper_agrees)


@functools.cache
def scaling_works(device: torch.device) -> bool:
    """Whether the kernel that scales int8 weights gives torch's bits on small cases."""
    return triton_works(device, scaling_agrees)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[M, K]`` as int8 and one float32 scale a row, ``[M, 1]``: symmetric, the absolute maximum becomes 127."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    return (x * (127.0 / largest)).round().clamp(-127, 127).to(torch.int8), largest / 127.0


def adapter_grads(g: Tensor, x: Tensor, up: Any, z: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``z``, which is x after the down-projections, of these, and of the up-projections."""
    columns, rank = g.shape[1] // segments, up.shape[1]
    parts = [slice(i * columns, (i + 1) * columns) for i in range(segments)]
    ranks = [slice(i * rank, (i + 1) * rank) for i in range(segments)]
    dz = torch.cat([g[:, p] @ up[p] for p in parts], dim=1)
    d_up = torch.cat([g[:, p].t() @ z[:, r] for p, r in zip(parts, ranks, strict=True)])
    return dz, dz.t() @ x, d_up


class _Linear(torch.autograd.Function):
    """See ``linear``. The backward pass needs the weight, and x only for the gradient of ``down``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor | None,
        up: Tensor | None,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        segments: int,
        int8_dynamic: bool,
        tag: str,
    ) -> Tensor:
        z = None if down is None else x @ down.t()
        ctx.segments, ctx.int8_dynamic, ctx.tag = segments, int8_dynamic, tag
        ctx.save_for_backward(None if down is None else x, down, up, z, weight, scale)
        if not int8_dynamic:
            return torch.ops.k5.matmul(x, weight, scale, bias, z, up, segments, tag)
        a, a_scale = quantize_rows(x)
        return torch.ops.k5.int8_matmul(a, a_scale, weight, scale, bias, z, up, segments, x.dtype, False, tag)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, z, weight, scale = ctx.saved_tensors
        g, segments = grads[0], ctx.segments
        dz = d_down = d_up = None
        if down is not None:
            dz, d_down, d_up = adapter_grads(g, x, up, z, segments)
        if ctx.int8_dynamic:
            # The sum runs over the weight's rows here, so their scales are multiplied into g before g is quantised.
            a, a_scale = quantize_rows(g.float() * scale.float().t())
            down_t = None if down is None else down.t()
            dx = torch.ops.k5.int8_matmul(a, a_scale, weight, None, None, dz, down_t, 1, g.dtype, True, "backward")
        else:
            dx = torch.ops.k5.matmul_backward(g, weight, scale, dz, down)
        return dx, d_down, d_up, None, None, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    segments: int,
    int8_dynamic: bool,
    tag: str,
) -> Tensor:
    """A frozen linear, or several that share an input, each with its LoRA.

    Args:
        x: ``[..., K]`` in the compute dtype.
        weight: ``[N, K]``, the weights of ``segments`` linears one below the other; int8, or in x's dtype.
        scale: ``[N, 1]``, of an int8 weight.
        down: ``[segments * R, K]`` in x's dtype, already times alpha / rank. None: no adapter.
        up: ``[N, R]``.
        int8_dynamic: multiply on int8 tensor cores. x is quantised row by row, and so is the gradient.
        tag: the matmul's name in a level of ``planning/memory.py``.

    Returns:
        ``[..., N]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Linear.apply(rows, down, up, weight, scale, bias, segments, int8_dynamic, tag)  # type: ignore[no-untyped-call]
    return out.reshape(*x.shape[:-1], out.shape[-1])
