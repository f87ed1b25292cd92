"""How much VRAM may a run use, and can the GPU compute in its precision?"""

from __future__ import annotations

import torch

from k5cache.shared.console import parse_bytes
from k5cache.shared.errors import RunError
from k5cache.shared.vram import for_torch, free_for_torch

_LEFT_FREE = 256 * 2**20  # of what the driver calls free: libraries load their kernels later


def budget(device: torch.device, vram: str | None) -> int | None:
    """Bytes that torch may reserve. None without a GPU, unless ``vram`` names a size.

    Args:
        vram: a card's size such as ``"12GB"``, of which the CUDA context and a desktop take their part. None: what is
            free on the GPU now.
    """
    if vram is not None:
        return for_torch(parse_bytes(vram))
    free = free_for_torch(device)
    return None if free is None else max(0, free - _LEFT_FREE)


def check_bfloat16(device: torch.device, mixed_precision: str) -> None:
    """Refuse a GPU that only emulates bfloat16, before anything is loaded.

    Raises:
        RunError: the GPU is older than Ampere.
    """
    if device.type == "cuda" and mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        raise RunError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16",
            "Use a GPU of the RTX 30 series or newer, or --set train.mixed_precision=fp32 (twice the memory, slow)",
        )
