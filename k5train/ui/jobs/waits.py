"""What does a job wait for? For a GPU that a job or another command has, or for a job that makes what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k5train.ui.jobs import processes, slots
from k5train.ui.jobs.job import Job, gpus_of
from k5train.ui.jobs.slots import Slot
from k5train.ui.project import Project

_FOREIGN = "you: it was not put in on this machine, or was changed since. It would run"


@dataclass(frozen=True)
class Wait:
    """Why a job waits."""

    words: str
    is_blocked: bool = False
    """It waits for a job that did not finish, and so for a person."""
    is_due: bool = False
    """Nothing stands in its way: whoever should have begun it was killed."""


def waits_for(project: Project, all_jobs: Sequence[Job], used: Mapping[str, str] | None = None) -> dict[str, Wait]:
    """For each waiting job, by its id, what it waits for.

    Args:
        used: what ``in_use`` has just said.
    """
    waiting = sorted((job for job in all_jobs if job.state == "waiting"), key=place_of)
    if not waiting:
        return {}
    all_slots = slots.slots()
    used = in_use(project, all_jobs, all_slots) if used is None else used
    by_id = {job.id: job for job in all_jobs}
    waits: dict[str, Wait] = {}
    room, before = len(all_slots) - len(used.keys() & {slot.key for slot in all_slots}), 0
    for job in waiting:
        wait = first_unfinished(job, by_id) if job.is_ours else Wait(f"{_FOREIGN}: {job.line}", is_blocked=True)
        needed = min(job.num_gpus, len(all_slots))
        if wait is None and job.needs_gpu and needed <= room:
            room -= needed
        elif wait is None and job.needs_gpu:
            users = list(dict.fromkeys(used[slot.key] for slot in all_slots if slot.key in used))
            ahead = f" and the {'job' if before == 1 else f'{before} jobs'} before it" if before else ""
            wait = Wait((" and " if needed == len(all_slots) else " or ").join(users) + ahead)
            room, before = 0, before + 1  # what is free is kept for it
        waits[job.id] = wait or Wait("nothing: it can begin", is_due=True)
    return waits


def in_use(
    project: Project,
    all_jobs: Sequence[Job],
    all_slots: Sequence[Slot],
    of_others: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Key of a slot -> what uses it, in words: a job, or a command that the queue did not start.

    Args:
        of_others: what ``others`` has just said.
    """
    of_others = others(project, all_jobs, all_slots) if of_others is None else of_others
    used = {
        key: job.about or job.label
        for job in all_jobs
        if not job.is_over and job.state != "waiting"
        for key in job.slots
    }
    return {key: words[0] for key, words in of_others.items()} | used


def others(project: Project, all_jobs: Sequence[Job], all_slots: Sequence[Slot]) -> dict[str, list[str]]:
    """Key of a slot -> the commands on it that the queue did not start, in words. A job may be on it as well."""
    ours = {job.command for job in all_jobs if job.command}
    found: dict[str, list[str]] = {}
    for process in external(project, ours, all_slots):
        if all_slots[0].variable is not None and processes.is_on_processor(process.words):
            continue
        for slot in slots.slots_of(all_slots, process.variables, gpus_of(process.words)):
            found.setdefault(slot.key, []).append(process.says)
    return found


def external(project: Project, ours: set[int], all_slots: Sequence[Slot]) -> list[processes.Process]:
    """The commands that work with models and that are no job of this project: all of this machine for a GPU, which two
    cannot share, and those in the project for the processor, which they can."""
    folder = None if all_slots[0].variable else project.root
    return [found for found in processes.working(processes.locks_of(project), folder) if found.pid not in ours]


def first_unfinished(job: Job, by_id: Mapping[str, Job]) -> Wait | None:
    """The first of the jobs that this one needs and that has not finished. One that was removed is not waited for."""
    for other in (by_id[id] for id in job.after if id in by_id):
        if other.state == "finished":
            continue
        if other.is_over:
            return Wait(
                f"{other.label}, which did not finish. Do that again, or remove it from the list", is_blocked=True
            )
        return Wait(other.label)
    return None


def place_of(job: Job) -> tuple[int, float, str]:
    """By which jobs stand in a row."""
    return job.order, job.added or 0.0, job.id
