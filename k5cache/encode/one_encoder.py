"""One encoder at a time: its memory is capped, freed afterwards, and named where it does not suffice."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

from k5cache.shared import console
from k5cache.shared.errors import DoesNotFit

_MEMORY_ENDED = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


@contextmanager
def alone(device: str, vram: int | None, name: str, planned: int = 0) -> Iterator[None]:
    """One encoder's time on the device: afterwards its memory is free again, or that is said.

    Args:
        vram: bytes that torch is held to; None: all there is.
        planned: bytes of VRAM that it will take by its plan.

    Raises:
        DoesNotFit: memory ended all the same.
    """
    import torch

    from k5cache.encoders import speed

    if not device.startswith("cuda"):
        with _when_memory_ends(device, name, planned):
            yield
        gc.collect()
        return
    speed.limit_vram(device, vram)
    before = torch.cuda.memory_allocated(device)
    try:
        with _when_memory_ends(device, name, planned):
            yield
    finally:
        left = release(device) - before
        speed.limit_vram(device, None)
    if left > 0:
        console.note(f"{name} left {console.human_bytes(left)} of VRAM behind")


@contextmanager
def _when_memory_ends(device: str, name: str, planned: int) -> Iterator[None]:
    """Turn running out of memory into an error that names the setting to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own, CUDA's for pinned memory, cuBLAS's, the CPU allocator's
        words = str(error).partition("\n")[0][:160]
        if not isinstance(error, MemoryError) and not _MEMORY_ENDED.search(words):
            raise
        kept = "what was finished is kept"
        if device == "cpu":
            problem = f"{name} ran out of memory: {words}"
            raise DoesNotFit(problem, f"Close other programs and run the same command again: {kept}") from error
        said = f", {console.human_bytes(planned)} of VRAM were planned" if planned else ""
        # A tenth less than the plan takes it to the next leaner one: fewer tokens at once, a layer at a time, strips.
        less = f", plan for less with k5cache encode --vram {0.9 * planned / 2**30:.1f}GB" if planned else ""
        raise DoesNotFit(
            f"{name} ran out of memory{said}: {words}",
            f"Close what else uses the GPU{less}, or use --device cpu: {kept}",
        ) from error


def release(device: str) -> int:
    """Give back what torch holds and does not use. Returns the bytes that are in use."""
    import torch

    gc.collect()
    if not device.startswith("cuda"):
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)
