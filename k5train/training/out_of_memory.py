"""What happens when VRAM ends: what was trained is saved, and the setting to change is named."""

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
    go_on: Callable[..., str],
    saved_plan: Callable[[], SavedPlan | None] = lambda: None,
) -> AbstractContextManager[None]:
    """Turn running out of VRAM into an error that names the setting to change, with what was trained on disk.

    Args:
        planned: the plan that the run follows by then.
        save: writes the adapter as it is, with what is needed to go on from it, and says where; None: there is nothing
            to save yet.
        go_on: the command to do it again, given what ``--set`` is to change.
        saved_plan: the plan that the run must go on with, if there is one. The advice is then not to plan for less.

    Raises:
        DoesNotFit: VRAM ended inside.
    """

    def refuse(words: str) -> DoesNotFit:
        torch.cuda.empty_cache()
        plan, saved, fixed = planned(), save(), saved_plan()
        kept = f"; the LoRA so far is in {saved}" if saved else ""
        return DoesNotFit(
            f"The GPU ran out of memory, {console.human_bytes(plan.peak)} were planned: {words}{kept}",
            fixed.advice if fixed else _plan_for_less(plan, go_on),
        )

    return vram.when_memory_ends(refuse, (torch.OutOfMemoryError,))


def _plan_for_less(plan: Plan, go_on: Callable[..., str]) -> str:
    """What to do where a plan was too much for the card."""
    whole = min(plan.budget, plan.peak) if plan.budget is not None else plan.peak
    card = (whole * 11 // 12 + vram.CONTEXT_BYTES) / 2**30
    if plan.streaming and plan.streaming.num_blocks == len(plan.levels):
        return "Free VRAM, or use a lower resolution, batch size or rank: nothing leaner can be planned"
    return f"Free VRAM, or plan for less: {go_on(set=f'train.memory.vram={card:.1f}GB')}"
