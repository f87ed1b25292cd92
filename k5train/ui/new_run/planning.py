"""What is said of memory and time beside the form? The plan, the amounts, and how long it takes, as far as is known."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k5cache.shared.units import count_of, human_seconds
from k5train.ui.jobs import queue, slots
from k5train.ui.jobs.slots import NVIDIA, Slot
from k5train.ui.listing import Entry
from k5train.ui.new_run.checked import Checked, Said, caution
from k5train.ui.new_run.earlier import Earlier, earlier_run
from k5train.ui.new_run.planner import Planner
from k5train.ui.new_run.planner_process import Question
from k5train.ui.project import Project


@dataclass(frozen=True)
class PlanView:
    """What stands beside the form."""

    state: str
    """``planned``, ``planning``, ``refused`` or ``nothing``: the recipe has a problem."""
    title: str = ""
    rows: tuple[tuple[str, str], ...] = ()
    amount: str = ""
    """How much is trained, in a sentence."""
    time: str = ""
    earlier: Earlier | None = None
    total: str = ""
    """The time of all steps at the speed of the earlier run."""
    cautions: tuple[Said, ...] = ()
    problem: str = ""
    fix: str = ""


NOTHING = PlanView("nothing")
PLANNING = PlanView("planning")


@dataclass(frozen=True)
class Room:
    """Where the next run would work."""

    slot: Slot | None
    """The GPU that nothing uses, or the processor. None: all GPUs are used."""
    used_by: str = ""
    card: str | None = None
    """The size of the first GPU, if it is used and its size is known."""

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU is free."""
        return self.slot is not None and self.slot.variable is not None


def room(project: Project) -> Room:
    """The first GPU that nothing uses now; or the processor, where there is no GPU."""
    all_slots = slots.slots()
    if all_slots[0].variable is None:
        return Room(all_slots[0], queue.gpu_in_use(project) or "")
    used = queue.in_use(project, queue.jobs(project), all_slots)
    free = next((slot for slot in all_slots if slot.key not in used), None)
    return Room(free) if free else Room(None, used[all_slots[0].key], _card_of(all_slots[0]))


def plan_view(
    project: Project, planner: Planner, recipe: str, checked: Checked, caches: Sequence[Entry], is_timed: bool = False
) -> PlanView | None:
    """Plan a recipe. Blocks while the planner works; None if a newer plan was asked for meanwhile.

    Args:
        is_timed: also time a step, which takes up to a minute. Only on a GPU that no run uses.
    """
    config = checked.config
    if config is None:
        return NOTHING
    here = room(project)
    names = tuple(cache.relative for cache in caches)
    if here.slot is None and here.card is None and config.memory.vram is None:
        problem = f"There is no plan while {here.used_by} uses the GPU, whose size is not known"
        return PlanView("refused", problem=problem, fix="Set train.memory.vram to plan for a card of that size")
    reply = planner.ask(Question(recipe, names, here.card, is_timed and here.is_gpu), here.slot)
    if reply is None:
        return None
    return view_of(reply, here, earlier_run(project, config, names), is_timed)


def view_of(reply: Mapping[str, Any], here: Room, earlier: Earlier | None, is_timed: bool = False) -> PlanView:
    """The planner's answer in words."""
    problem, fix = reply.get("does_not_fit") or reply.get("problem") or ("", "")
    steps = reply.get("steps")
    total = (
        f"{human_seconds(steps * earlier.seconds_per_step)} for {count_of(steps, 'step')}" if earlier and steps else ""
    )
    return PlanView(
        "refused" if problem else "planned",
        str(reply.get("title", "")),
        tuple((str(what), str(how)) for what, how in reply.get("rows", ())),
        _amount(reply),
        _time(reply, here, is_timed),
        earlier,
        total,
        tuple(map(caution, reply.get("cautions", ()))),
        problem,
        fix,
    )


def _amount(reply: Mapping[str, Any]) -> str:
    if not reply.get("images"):
        return ""
    steps, images, passes = reply["steps"], reply["images"], reply["passes"]
    times = f"{passes:.0f}" if passes >= 10 else f"{passes:.2g}"
    return f"{count_of(steps, 'step, which goes', 'steps, which go')} {times} times through {count_of(images, 'image')}"


def _time(reply: Mapping[str, Any], here: Room, is_timed: bool) -> str:
    if here.slot is None:
        return f"not known while {here.used_by} uses the GPU"
    if here.slot.variable is None:
        return "not known: there is no GPU here to time it on"
    if "time" in reply:
        return str(reply["time"]) or "not known: the blocks could not be timed on this GPU"
    return "timing a few blocks..." if not is_timed and "rows" in reply else "not known"


@functools.cache
def _card_of(slot: Slot) -> str | None:
    """The size of a GPU that is not asked through torch, which would take memory of it."""
    program = shutil.which("nvidia-smi") if slot.variable == NVIDIA else None
    if program is None:
        return None
    command = [program, f"--id={slot.key}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=20, check=True, text=True)
        return f"{int(done.stdout) / 1024:.3g}GB"
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
