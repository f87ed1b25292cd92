"""One encoder at a time: its memory is limited and then freed, and an error says so if there is not enough."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from k5cache.shared import console, vram
from k5cache.shared.errors import DoesNotFit


@contextmanager
def one_encoder(device: str, card_bytes: int | None, name: str, planned: int = 0) -> Iterator[None]:
    """Run one encoder on the device and free its memory afterwards. If some of it stays in use, say so.

    Args:
        card_bytes: the size of card that torch is limited to; None: no limit.
        planned: bytes of VRAM that its plan says it takes.

    Raises:
        DoesNotFit: memory ran out all the same.
    """
    import torch

    if not device.startswith("cuda"):
        with when_memory_ends(device, name, planned):
            yield
        gc.collect()
        return
    vram.limit_to_card(device, card_bytes)
    before = torch.cuda.memory_allocated(device)
    try:
        with when_memory_ends(device, name, planned):
            yield
    finally:
        left = vram.release(device) - before
        vram.limit_to_card(device, None)
    if left > 0:
        console.note(f"{name} left {console.human_bytes(left)} of VRAM behind")


def when_memory_ends(device: str, name: str, planned: int) -> AbstractContextManager[None]:
    """Turn running out of memory into an error that names the setting to change."""

    def refuse(words: str) -> DoesNotFit:
        note = "what was finished is kept"
        if device == "cpu":
            problem = f"{name} ran out of memory: {words}"
            return DoesNotFit(problem, f"Close other programs and run the same command again: {note}")
        expected = f", {console.human_bytes(planned)} of VRAM were planned" if planned else ""
        # A tenth less than planned gives the next leaner plan: fewer tokens at once, a layer at a time, strips.
        less = f", run the same `k5cache encode` with --vram {0.9 * planned / 2**30:.1f}GB" if planned else ""
        return DoesNotFit(
            f"{name} ran out of memory{expected}: {words}",
            f"Close what else uses the GPU{less}, or use --device cpu: {note}",
        )

    return vram.when_memory_ends(refuse)
