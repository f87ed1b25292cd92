"""How are seconds, VRAM and host memory of an encoder measured?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k5cache.shared import system
from k5cache.shared.vram import release

if TYPE_CHECKING:
    import torch


def collect(rows: Iterator[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
    """Copies of the rows in the order of their captions, as a shard would take them."""
    copies = {i: row.clone() for i, row in rows}
    return [copies[i] for i in range(len(copies))]


def timed(device: str, run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until the device is done, what ``run`` returns)."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def in_use(device: str) -> int:
    """Bytes that torch has allocated on the device."""
    import torch

    return int(torch.cuda.memory_allocated(device)) if device != "cpu" else 0


def reset_peak(device: str) -> None:
    """Start a new measurement of peak VRAM."""
    import torch

    release(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def peak_vram(device: str) -> int:
    """The most VRAM that torch reserved since ``reset_peak``, and what the process takes outside its allocator."""
    import torch

    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)  # the CUDA context; on a shared card, others too
    return int(torch.cuda.max_memory_reserved(device) + outside)


@dataclass
class Memory:
    """Host memory of the process while a block runs, in bytes."""

    peak: int = 0


@contextmanager
def watched() -> Iterator[Memory]:
    """Measure the process's largest resident set, 50 times a second."""
    memory, is_over = Memory(system.resident_bytes()), threading.Event()

    def look() -> None:
        while not is_over.wait(0.02):
            memory.peak = max(memory.peak, system.resident_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()
        memory.peak = max(memory.peak, system.resident_bytes())
