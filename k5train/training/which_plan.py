"""Which memory plan does a run train with: its saved plan, the plan of a sweep's shared base, or a new one?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks
from k5train.planning.memory import Plan
from k5train.planning.plan import largest_sizes, plan_training
from k5train.planning.saved_plan import SavedPlan, read_saved_plan

if TYPE_CHECKING:
    from k5train.data.mixture import Mixture
    from k5train.runs.resume_state import SavedState


def decide_plan(
    data: Mixture,
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    saved: SavedState | None,
    shared: Plan | None,
    ranks: Ranks = ALONE,
) -> Plan:
    """The memory plan of a run. It is decided once, before anything is loaded.

    Args:
        saved: the state that the run resumes from. A deterministic run also resumes with the plan in it.
        shared: the plan of the base that the run shares with the other runs of a sweep.
        ranks: the processes that train together. All plan for the GPU with the least VRAM.

    Raises:
        DoesNotFit: no plan fits, or there is no room for the saved plan.
        RecipeError: a LoRA target matches nothing.
        RunError: the saved plan cannot be read, or the shared base streams other weights than it does.
    """
    saved_plan = read_saved_plan(saved, config.deterministic)
    if saved and config.deterministic and not saved_plan:
        console.warn(
            "The run was saved without its memory plan. It is exact only if the new plan happens to be the same"
        )
    if shared is not None:
        return plan_on_shared_base(shared, saved_plan)
    sizes = largest_sizes(*(source.cache for source in data.sources))
    return plan_training(folder, config, device, sizes, saved_plan, partial(_least, ranks))


def _least(ranks: Ranks, budget: int | None) -> int | None:
    """The least budget of all processes."""
    budgets = [one for one in ranks.gather(budget) if one is not None]
    return min(budgets, default=None)


def plan_on_shared_base(shared: Plan, saved_plan: SavedPlan | None) -> Plan:
    """The plan of a run whose base is already loaded by the plan ``shared``: the run's saved plan if it has one.

    Raises:
        DoesNotFit: there is no room for the saved plan.
        RunError: the saved plan streams other weights, which would have to move.
    """
    if saved_plan is None:
        return shared
    plan = saved_plan.within(shared.budget)
    if plan.streaming != shared.streaming:
        raise RunError(
            f"{saved_plan.run} must go on with its saved memory plan, and the base of this sweep streams other weights",
            f"Resume it alone: {console.command('k5train', 'resume', saved_plan.run)}",
        )
    return plan
