"""Which memory plan does a deterministic run go on with, and is there still room for it?

What blocks recompute is in their compiled graphs, and with it the order of their sums. The VRAM that happens to be free
decides it once, at the start; a run that is to end with the same bits goes on as it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.errors import DoesNotFit, RunError
from k5train.planning.memory import LEVELS, Plan, Streaming
from k5train.runs.resume_state import Saved, broken


@dataclass(frozen=True)
class Kept:
    """The plan that a run saved, to go on with."""

    run: Path
    """Its folder."""
    plan: Plan

    @property
    def advice(self) -> str:
        """What to do where there is no room for it."""
        inexactly = console.command("k5train", "resume", self.run, set="train.deterministic=false")
        return f"Free VRAM, or go on with a new plan, not bit for bit: {inexactly}"

    def within(self, budget: int | None) -> Plan:
        """The plan for ``budget`` bytes of VRAM; None: no limit.

        Raises:
            DoesNotFit: it takes more.
        """
        # To the last byte: the margin of a new plan is for predictions, and this one has run.
        if budget is not None and self.plan.peak > budget:
            raise DoesNotFit(
                f"{self.run} is deterministic and goes on with the memory plan it has, which needs "
                f"{console.human_bytes(self.plan.peak)} of VRAM, there is {console.human_bytes(budget)} for torch",
                self.advice,
            )
        return replace(self.plan, budget=budget)


def facts_of(plan: Plan, deterministic: bool) -> dict[str, Any]:
    """What a state says of the plan, as JSON: all of it where the run is deterministic, else nothing."""
    return {"plan": asdict(plan)} if deterministic else {}


def kept_plan(saved: Saved | None, deterministic: bool) -> Kept | None:
    """The inverse: the plan that a run has to go on with.

    Args:
        deterministic: as the recipe has it now.

    Returns:
        None where a new one may be made: nothing is saved, or not to the bit, or by a version that kept no plans.

    Raises:
        RunError: the state's plan is not one, or of another version.
    """
    if saved is None or not deterministic or "plan" not in saved.facts:
        return None
    run = saved.folder.parent.parent
    try:
        unknown = set(saved.facts["plan"]["levels"]) - set(LEVELS)
        if unknown:
            inexactly = console.command("k5train", "resume", run, set="train.deterministic=false")
            raise RunError(
                f"{run} has a memory plan of another version: levels {', '.join(sorted(unknown))}",
                f"Use that version, or go on with a new plan, not bit for bit: {inexactly}",
            )
        return Kept(run, _read(saved.facts["plan"]))
    except (KeyError, TypeError, ValueError) as error:
        raise broken(saved.folder / "state.json", error) from error


def _read(document: Mapping[str, Any]) -> Plan:
    streaming, sizes = document["streaming"], document["sizes"]
    return Plan(
        tuple(document["levels"]),
        Streaming(**streaming) if streaming else None,
        document["parts"],
        document["budget"],
        document["host_bytes"],
        (sizes[0], sizes[1]) if sizes else None,
    )
