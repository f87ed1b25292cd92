"""How is a weight that is stored small multiplied? Frozen linears in int8, and in 16 bits computed in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """A frozen linear with int8 weights and one scale a row. Its numbers are those of optimum-quanto's ``QLinear``.

    ``weight`` is a plain int8 buffer, so that offload, safetensors, DDP and ``torch.compile`` treat it as any tensor.
    peft wraps it as it wraps any ``nn.Linear``.

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
        # Added after the matmul, as quanto does: a fused addmm would round once and not twice.
        return output if self.bias is None else output + self.bias

    def dequantize(self) -> Tensor:
        """The weight as the matmul sees it: ``[out, in]`` in the scale's dtype."""
        return self.scale * self.weight

    @property
    def W_q(self) -> Tensor:  # noqa: N802 (peft's name)
        """The stored weight. If a linear has this attribute, peft calls its ``dequantize()`` to compute DoRA's norms
        (``peft.utils.integrations.dequantize_module_weight``)."""
        return self.weight


class _Int8Matmul(torch.autograd.Function):
    """``input @ (scale * weight).T`` with a gradient for the input only.

    The backward pass needs the weight but not the input, so no activation is kept; quanto's own function keeps its
    input. The weight is scaled and not the product, because inductor on CUDA rewrites ``x @ w.to(bf16) * scale`` into
    ``_weight_int8pack_mm``, which refuses a ``[out, 1]`` scale.
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
    """A frozen linear computed in float32, whatever dtype its weights are stored in.

    diffusers keeps the modulations and the time embedding in float32 (``_keep_in_fp32_modules``). The hub's weights
    are bf16. Stored so, they take 1.2 GB and not 2.4, and as float32 they are the same numbers.

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
