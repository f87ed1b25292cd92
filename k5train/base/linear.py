"""Frozen linears: how a weight that is stored small is multiplied, and what backward needs of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """A frozen linear with int8 weights and one scale a row, numerically optimum-quanto's frozen ``QLinear``.

    ``weight`` is a plain int8 buffer, so that offload, safetensors, DDP and ``torch.compile`` treat it as any tensor;
    being an ``nn.Linear``, it is wrapped by peft as one.

    Args:
        weight: ``[out, in]`` int8.
        scale: ``[out, 1]`` in the dtype that the matmul runs in.
        bias: ``[out]`` in that dtype, or None.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.out_features, self.in_features = weight.shape
        if weight.dtype != torch.int8 or scale.shape != (self.out_features, 1):
            raise ValueError(
                f"expected an int8 weight and a [{self.out_features}, 1] scale,"
                f" found {weight.dtype} and {list(scale.shape)}"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the scale's dtype."""
        output: Tensor = _Int8Matmul.apply(input.to(self.scale.dtype), self.weight, self.scale)  # type: ignore[no-untyped-call]
        # Apart from the matmul, as quanto adds it: a fused addmm would round once instead of twice.
        return output if self.bias is None else output + self.bias

    def dequantize(self) -> Tensor:
        """``[out, in]`` in the scale's dtype: the weight that the matmul multiplies with."""
        return self.scale * self.weight

    @property
    def W_q(self) -> Tensor:  # noqa: N802 (peft's name)
        """The weight as it is held. peft asks a linear that has this for ``dequantize()``, to take DoRA's norms of
        (``peft.utils.integrations.dequantize_module_weight``)."""
        return self.weight


class _Int8Matmul(torch.autograd.Function):
    """``input @ (scale * weight).T`` with a gradient for the input only.

    Backward needs the weight, never the input, so nothing that belongs to a step is kept: quanto's own function
    saves its input too. The weight is scaled, not the product: inductor rewrites ``x @ w.to(bf16) * scale`` on CUDA
    into ``_weight_int8pack_mm``, which refuses a ``[out, 1]`` scale.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows = input.reshape(-1, input.shape[-1])
        return torch.matmul(rows, (scale * weight).t()).reshape(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return torch.matmul(grads[0], scale * weight), None, None


class Float32Linear(nn.Linear):
    """A frozen linear computed in float32, whatever its weights are stored in.

    diffusers keeps the modulations and the time embedding in float32 (``_keep_in_fp32_modules``). The hub's weights
    are bf16: stored so, they take 1.2 GB instead of 2.4, and upcast they are the same numbers.

    Args:
        weight: ``[out, in]``, float32 or narrower.
        bias: ``[out]``, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` float32."""
        return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())
