"""One encoder at a time: its memory is capped, freed afterwards, and named where it does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from k5cache.shared import console, vram
from k5cache.shared.errors import DoesNotFit


@contextmanager
def one_encoder(device: str, card_bytes: int | None, name: str, planned: int = 0) -> Iterator[None]:
    """One encoder's time on the device: afterwards its memory is free again, or that is said.

    Args:
        card_bytes: the size of card that torch is limited to; None: no limit.
        planned: bytes of VRAM that it will take by its plan.

    Raises:
        DoesNotFit: memory ended all the same.
    """
    import torch

    if not device.startswith("cuda"):
        with _when_memory_ends(device, name, planned):
            yield
        gc.collect()
        return
    vram.limit_to_card(device, card_bytes)
    before = torch.cuda.memory_allocated(device)
    try:
        with _when_memory_ends(device, name, planned):
            yield
    finally:
        left = vram.release(device) - before
        vram.limit_to_card(device, None)
    if left > 0:
        console.note(f"{name} left {console.human_bytes(left)} of VRAM behind")


def _when_memory_ends(device: str, name: str, planned: int) -> AbstractContextManager[None]:
    """Turn running out of memory into an error that names the setting to change."""

    def refuse(words: str) -> DoesNotFit:
        kept = "what was finished is kept"
        if device == "cpu":
            problem = f"{name} ran out of memory: {words}"
            return DoesNotFit(problem, f"Close other programs and run the same command again: {kept}")
        said = f", {console.human_bytes(planned)} of VRAM were planned" if planned else ""
        # A tenth less than the plan takes it to the next leaner one: fewer tokens at once, a layer at a time, strips.
        less = f", plan for less with k5cache encode --vram {0.9 * planned / 2**30:.1f}GB" if planned else ""
        return DoesNotFit(
            f"{name} ran out of memory{said}: {words}",
            f"Close what else uses the GPU{less}, or use --device cpu: {kept}",
        )

    return vram.when_memory_ends(refuse)
