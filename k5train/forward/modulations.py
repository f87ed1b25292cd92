"""How are a block's modulations computed? In float32, from weights that are stored in bfloat16.

torch first copies the weights to float32, which for one block is four times the reading of the weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5train.base.linear import Float32Linear
from k5train.forward.checks import triton_works

_MOST_ROWS = 8  # each reads the weights anew


def modulations(module: nn.Module, time: Tensor) -> Tensor:
    """What diffusers' ``Kandinsky5Modulation`` returns, ``[B, num_params * D]`` float32.

    Args:
        module: the block's.
        time: ``[B, T]``, the embedded time.
    """
    linear: Any = getattr(module, "out_layer", None)
    needs_gradient = torch.is_grad_enabled() and time.requires_grad
    is_known = type(linear) is Float32Linear and time.is_cuda and time.dim() == 2 and not needs_gradient
    if not is_known or len(time) > _MOST_ROWS or not modulations_work(time.device):
        out: Tensor = module(time)
        return out
    from k5train.forward import row_kernels

    return row_kernels.float32_linear(module.activation(time).float(), linear.weight, linear.bias)  # type: ignore[operator]


@functools.cache
def modulations_work(device: torch.device) -> bool:
    """Whether the kernel agrees with torch's linear on small cases."""
    return triton_works(device, _agrees)


def _agrees(device: torch.device) -> bool:
    from k5train.forward import row_kernels

    generator = torch.Generator(device).manual_seed(0)
    for rows, columns, inner in ((1, 23040, 512), (3, 100, 600)):
        x, weight, bias = (
            torch.randn(shape, device=device, generator=generator)
            for shape in ((rows, inner), (columns, inner), (columns,))
        )
        weight, bias = weight.bfloat16(), bias.bfloat16()
        for with_bias in (bias, None):
            plain = F.linear(x.double(), weight.double(), None if with_bias is None else with_bias.double())
            for _ in range(2):  # the first compiles, the second launches directly
                try:
                    ours = row_kernels.float32_linear(x, weight, with_bias)
                except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                    return False
                if not ((ours.double() - plain).norm() <= 1e-6 * plain.norm()).item():  # float32: 2e-7
                    return False
    return True
