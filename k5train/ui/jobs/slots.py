"""How many jobs may run at once? One a GPU that this process may see, or one on the processor. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from k5cache.shared.gpus import AMD, AMD_BELOW, NVIDIA, Slot, allowed, visible

__all__ = ["AMD", "NVIDIA", "PROCESSOR", "Slot", "env_of", "slots", "slots_of", "words_of"]

PROCESSOR = Slot("cpu", 0, "the processor")


def slots(env: Mapping[str, str] = os.environ) -> tuple[Slot, ...]:
    """The GPUs that a process with these variables may use, or the processor if there are none."""
    return allowed(env) or (PROCESSOR,)


def slots_of(all_slots: Sequence[Slot], variables: Mapping[str, str] | None, count: int = 1) -> tuple[Slot, ...]:
    """Which of the slots a process uses that was started otherwise: the first that it may see.

    Args:
        variables: its environment. None: it is not known, and it is taken for one without these variables.
        count: how many GPUs it uses.

    Returns:
        nothing if it uses none of them: its variables name other GPUs, or none at all.
    """
    first = all_slots[0]
    if first.variable is None:
        return (first,)
    variables = variables or {}
    variable = variables.get(first.variable)
    if variable is None and first.variable == AMD:
        variable = variables.get(NVIDIA)
    seen = {slot: slot for slot in sorted(all_slots, key=lambda slot: slot.number)}  # as the process counts them
    if (
        first.variable == AMD and AMD_BELOW in variables and AMD_BELOW not in os.environ
    ):  # else the slots are that job's
        shown = visible(all_slots, variables[AMD_BELOW])
        seen = {replace(slot, key=str(number), number=number): slot for number, slot in enumerate(shown)}
    if variable is None:
        return tuple(seen.values())[:count]
    return tuple(seen[slot] for entry in variable.split(",")[:count] for slot in visible(tuple(seen), entry))


def env_of(given: Sequence[Slot]) -> dict[str, str]:
    """The variables with which a process sees these GPUs alone."""
    variables = {slot.variable for slot in given if slot.variable}
    return {variable: ",".join(slot.key for slot in given) for variable in variables}


def words_of(given: Sequence[Slot]) -> str | None:
    """``GPU 0``, ``GPUs 0 and 1`` or ``processor``; None if there are none."""
    if len(given) < 2:
        return given[0].words if given else None
    *first, last = [str(slot.number) for slot in given]
    return f"GPUs {', '.join(first)} and {last}"
