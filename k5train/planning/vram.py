"""How much VRAM may be used, and how much of it is left?"""

from __future__ import annotations

import torch

from k5cache.shared.console import parse_bytes
from k5cache.shared.errors import RunError
from k5train.planning.memory import CONTEXT_BYTES


def check_bfloat16(device: torch.device, mixed_precision: str) -> None:
    """Refuse a GPU that only imitates bfloat16, before anything is loaded.

    Raises:
        RunError: it is older than Ampere.
    """
    if device.type == "cuda" and mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        raise RunError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16",
            "Use a GPU of the RTX 30 series or newer, or --set train.mixed_precision=fp32 (twice the memory, slow)",
        )


_KEPT_FREE = 256 * 2**20  # of what the driver calls free: libraries load their kernels later


_limits: dict[torch.device, int] = {}


def budget(device: torch.device, vram: str | None) -> int | None:
    """Bytes that torch may reserve. None: no GPU, and no size is pretended.

    Args:
        vram: a card's size such as ``"12GB"``, of which the CUDA context and a desktop take their part; None: what
            is free on the GPU now.
    """
    if vram is not None:
        return max(0, parse_bytes(vram) - CONTEXT_BYTES)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free + torch.cuda.memory_reserved(device) - _KEPT_FREE)


def limit(device: torch.device, num_bytes: int | None) -> None:
    """Have torch refuse to reserve more than ``num_bytes``: what was planned for is what is used."""
    if device.type != "cuda" or num_bytes is None:
        return
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total))  # of the current device: no index is known
    _limits[device] = num_bytes


def left(device: torch.device) -> int | None:
    """Bytes that can still be allocated. None: no GPU."""
    if device.type != "cuda":
        return None
    used, cached = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free = torch.cuda.mem_get_info(device)[0] + cached - used
    return min(free, _limits[device] - used) if device in _limits else free
