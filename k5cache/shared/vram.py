"""How much VRAM is there, how much of it may torch take, and what happens when it ends?

torch is imported inside the functions: planning and ``--help`` need none of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from k5cache.shared.errors import DoesNotFit

CONTEXT_BYTES = 768 * 2**20
"""VRAM outside torch's allocator: the CUDA context, libraries' kernels, a desktop. The rest of a card is for torch."""

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)

_limits: dict[int, int] = {}
"""Device index -> the bytes that torch is limited to."""


def for_torch(card_bytes: int) -> int:
    """Bytes that torch may reserve on a card of ``card_bytes``."""
    return max(0, card_bytes - CONTEXT_BYTES)


def free_for_torch(device: str | torch.device) -> int | None:
    """Bytes that torch can reserve now, with those that it has reserved already. None on a CPU."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def free_card(device: str | torch.device) -> int | None:
    """The size of the card that this process could fill now, its own CUDA context included. None on a CPU."""
    import torch

    free = free_for_torch(device)
    if free is None:
        return None
    _, total = torch.cuda.mem_get_info(device)
    return min(total, free + CONTEXT_BYTES)  # this process's context is already taken


def limit(device: str | torch.device, num_bytes: int | None) -> None:
    """Have torch refuse to reserve more than ``num_bytes`` on a GPU, as a smaller card would. None lifts the limit."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    _, total = torch.cuda.mem_get_info(index)
    torch.cuda.set_per_process_memory_fraction(1.0 if num_bytes is None else min(1.0, num_bytes / total), index)
    _limits.pop(index, None)
    if num_bytes is not None:
        _limits[index] = num_bytes


def limit_to_card(device: str | torch.device, card_bytes: int | None) -> None:
    """Have torch reserve no more than it could on a card of ``card_bytes``. None lifts the limit."""
    limit(device, None if card_bytes is None else for_torch(card_bytes))


def left(device: str | torch.device) -> int | None:
    """Bytes that can still be allocated. None on a CPU."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    used, cached = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
    free = torch.cuda.mem_get_info(index)[0] + cached - used
    return min(free, _limits[index] - used) if index in _limits else free


def release(device: str | torch.device) -> int:
    """Give back what torch has reserved and does not use. Returns the bytes that are in use; 0 on a CPU."""
    import gc

    import torch

    gc.collect()
    if torch.device(device).type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


@contextmanager
def when_memory_ends(
    refuse: Callable[[str], DoesNotFit], errors: tuple[type[Exception], ...] = (MemoryError, RuntimeError)
) -> Iterator[None]:
    """Turn running out of memory into an error that names the setting to change.

    Args:
        refuse: makes that error from the first line of what torch or the system said.
        errors: the kinds to look at. The default catches torch's own, CUDA's for pinned memory, cuBLAS's, the CPU
            allocator's and Python's.

    Raises:
        DoesNotFit: memory ended inside.
    """
    try:
        yield
    except errors as error:
        words = str(error).partition("\n")[0][:160]
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(words):
            raise
        raise refuse(words) from error
