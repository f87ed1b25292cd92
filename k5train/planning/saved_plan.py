"""Which memory plan does a deterministic run go on with, and is there still room for it?

The plan decides what blocks recompute, and so the compiled code, the order of additions and the last bits. It depends
on the VRAM that is free at the start. A run that must end with the same bits therefore goes on with its first plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.errors import DoesNotFit, RunError
from k5train.planning.memory import LEVELS, Plan, Streaming
from k5train.runs.resume_state import INEXACT, MANIFEST, SavedState, broken, inexactly, same_command


@dataclass(frozen=True)
class SavedPlan:
    """The plan that a run must go on with."""

    run: Path
    """The run's folder."""
    plan: Plan

    def advice(self, retry: Callable[..., str] | None = None) -> str:
        """What to do if there is no room for the plan.

        Args:
            retry: the command that goes on, given an option. None: nothing of the run is changed yet.
        """
        command = (retry or partial(same_command, self.run))(set=INEXACT)
        return f"Free VRAM, or resume with a new plan, which changes the last bits: {command}"

    def within(self, budget: int | None) -> Plan:
        """The plan, with ``budget`` bytes of VRAM as its budget. None: no limit.

        Raises:
            DoesNotFit: it needs more.
        """
        # Without the margin of a new plan, which allows for wrong predictions: this one has run.
        if budget is not None and self.plan.peak > budget:
            raise DoesNotFit(
                f"{self.run} is deterministic and must go on with its saved memory plan, which needs "
                f"{console.human_bytes(self.plan.peak)} of VRAM, there is {console.human_bytes(budget)} for torch",
                self.advice(),
            )
        return replace(self.plan, budget=budget)


def plan_facts(plan: Plan, deterministic: bool) -> dict[str, Any]:
    """What a resume state says of the plan, as JSON: all of it if the run is deterministic, otherwise nothing."""
    return {"plan": asdict(plan)} if deterministic else {}


def read_saved_plan(saved: SavedState | None, deterministic: bool) -> SavedPlan | None:
    """The plan that a run must go on with.

    Args:
        deterministic: what the recipe says now.

    Returns:
        None if the run is free to plan again: nothing is saved, the run is not deterministic, or the version that
        saved it did not save plans.

    Raises:
        RunError: the saved plan cannot be read, or another version wrote it.
    """
    if saved is None or not deterministic or "plan" not in saved.facts:
        return None
    run = saved.folder.parent.parent
    try:
        unknown = set(saved.facts["plan"]["levels"]) - set(LEVELS)
        if unknown:
            raise RunError(
                f"{run} has a memory plan of another version: levels {', '.join(sorted(unknown))}",
                f"Use that version, or resume with a new plan, which changes the last bits: {inexactly(run)}",
            )
        return SavedPlan(run, plan_of(saved.facts["plan"]))
    except (KeyError, TypeError, ValueError) as error:
        raise broken(saved.folder / MANIFEST, error) from error


def plan_of(document: Mapping[str, Any]) -> Plan:
    """A plan from its fields, as JSON has them."""
    streaming, sizes = document["streaming"], document["sizes"]
    return Plan(
        tuple(document["levels"]),
        Streaming(**streaming) if streaming else None,
        document["parts"],
        document["budget"],
        document["host_bytes"],
        (sizes[0], sizes[1]) if sizes else None,
        document.get("is_captured", False),  # earlier versions captured nothing
    )
