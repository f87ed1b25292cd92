"""What happens if a run is out of VRAM? What was trained is saved, and the error names the setting to change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k5cache.shared import console, vram
from k5cache.shared.errors import DoesNotFit
from k5train.planning.memory import Plan

if TYPE_CHECKING:
    from k5train.planning.saved_plan import SavedPlan


def when_memory_ends(
    planned: Callable[[], Plan],
    save: Callable[[], Path | None],
    retry: Callable[..., str],
    saved_plan: Callable[[], SavedPlan | None] = lambda: None,
) -> AbstractContextManager[None]:
    """Turn running out of VRAM into an error that names the setting to change. What was trained is saved first.

    Args:
        planned: returns the plan that the run has by then.
        save: saves the adapter and the state to resume from, and returns the path of the LoRA; None if there is nothing
            to save yet.
        retry: the command that tries again, given ``vram`` or what ``--set`` changes. ``--vram`` is obeyed even if the
            command that is running has another one.
        saved_plan: returns the plan that the run must go on with, if there is one. The advice is then not to plan for
            less.

    Raises:
        DoesNotFit: VRAM ran out in the block.
    """

    def refuse(words: str) -> DoesNotFit:
        torch.cuda.empty_cache()
        plan, lora, fixed_plan = planned(), save(), saved_plan()
        ending = f"; the LoRA so far is in {lora}" if lora else ""
        return DoesNotFit(
            f"The GPU ran out of memory, {console.human_bytes(plan.peak)} were planned: {words}{ending}",
            fixed_plan.advice(retry) if fixed_plan else _plan_for_less(plan, retry),
        )

    return vram.when_memory_ends(refuse, (torch.OutOfMemoryError,))


def _plan_for_less(plan: Plan, retry: Callable[..., str]) -> str:
    """What to do if a plan was too large for the card."""
    num_bytes = min(plan.budget, plan.peak) if plan.budget is not None else plan.peak
    card = (num_bytes * 11 // 12 + vram.CONTEXT_BYTES) / 2**30
    if plan.streaming and plan.streaming.num_blocks == len(plan.levels):
        return "Free VRAM, or use a lower resolution, batch size or rank: nothing leaner can be planned"
    return f"Free VRAM, or plan for less: {retry(vram=f'{card:.1f}GB')}"
