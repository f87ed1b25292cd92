"""How many jobs may run at once? One a GPU that this process may see, or one on the processor. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from k5cache.shared.gpus import AMD, NVIDIA, Slot, allowed, visible

__all__ = ["AMD", "NVIDIA", "PROCESSOR", "Slot", "slot_of", "slots"]

PROCESSOR = Slot("cpu", 0, "the processor")


def slots(env: Mapping[str, str] = os.environ) -> tuple[Slot, ...]:
    """The GPUs that a process with these variables may use, or the processor if there are none."""
    return allowed(env) or (PROCESSOR,)


def slot_of(all_slots: Sequence[Slot], variables: Mapping[str, str] | None) -> Slot | None:
    """Which of the slots a process uses that was started otherwise: the first that it may see.

    Args:
        variables: its environment. None: it is not known, and it is taken for one without these variables.

    Returns:
        None if it uses none of them: its variables name another GPU, or none at all.
    """
    first = all_slots[0]
    if first.variable is None:
        return first
    variable = (variables or {}).get(first.variable)
    if variable is None and first.variable == AMD:
        variable = (variables or {}).get(NVIDIA)
    if variable is None:
        return min(all_slots, key=lambda slot: slot.number)
    return next(iter(visible(all_slots, variable.split(",")[0])), None)
