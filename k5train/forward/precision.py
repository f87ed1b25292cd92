"""Which precision does a run with ``base_model_precision = "auto"`` train on? The GPU and the recipe decide.

torch is imported when the GPU is asked, so that whatever can be refused without it is refused first.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from k5cache.shared import console
from k5cache.shared.device import is_rocm
from k5train.options.precision import Precision, can_be_dynamic, is_open, with_precision
from k5train.options.train import TrainConfig

if TYPE_CHECKING:
    import torch


def decided(config: TrainConfig, *, is_imagined: bool = False) -> TrainConfig:
    """The recipe with the precision that ``auto`` means here. Any other precision stays.

    Args:
        is_imagined: without a GPU, plan for the card that ``memory.vram`` describes, which has int8 tensor cores.
    """
    return with_precision(config, chosen([config], is_imagined=is_imagined)) if is_open(config) else config


decided_for_plan = partial(decided, is_imagined=True)


def chosen(configs: Sequence[TrainConfig], *, is_imagined: bool = False) -> Precision:
    """What ``auto`` means for runs that share a base: ``int8-dynamic`` if all of them can be trained on it here."""
    if not all(can_be_dynamic(config) for config in configs):
        return "int8-quanto"
    import torch

    if torch.cuda.is_available():
        return "int8-dynamic" if kernel_is_fast(torch.device("cuda")) else "int8-quanto"
    return "int8-dynamic" if is_imagined and all(config.memory.vram for config in configs) else "int8-quanto"


def kernel_is_fast(device: torch.device) -> bool:
    """Whether our int8 kernel runs on this NVIDIA GPU's tensor cores. On AMD's it was never timed, nor was torch's own
    int8 matmul on any."""
    import torch

    from k5train.forward import ops

    if is_rocm() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    works = ops.kernel_works(device)
    if not works:  # an error may hold tensors in a cycle, and no collection looks at them after `begin_to_collect`
        gc.collect()
    torch.cuda.empty_cache()  # a plan that follows looks at what is free
    return works


def announce(precision: str) -> None:
    """Say what ``auto`` became, and how to have the other."""
    if precision == "int8-dynamic":
        console.note(
            "base_model_precision = auto: int8-dynamic, which multiplies on this GPU's int8 tensor cores. For quanto's"
            " int8, multiplied in 16 bits: --set train.base_model_precision=int8-quanto"
        )
