"""Which job is next? What there is to do is in ``.k5/queue``. Who changes it has its lock; who ends begins the next.

A job is a folder (``folder.py``). It begins when a GPU is free and what it needs is there: ``advance`` sees to that. It
is called after every change, by each worker at its end, and by a waiter (``waiter.py``) while something that is not a
job has the GPU. So the queue goes on without the page.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from k5cache.shared import system
from k5cache.shared.errors import OutputError, RunError
from k5cache.shared.lock import Locked, lock_file
from k5cache.shared.outputs import check_writable
from k5train.ui.jobs import folder as job_files
from k5train.ui.jobs import processes, slots
from k5train.ui.jobs.job import PROGRAMS, WITHOUT_GPU, Job, error_of, now, progress, read_job, tail
from k5train.ui.jobs.slots import Slot, env_of, words_of
from k5train.ui.jobs.waits import Wait, first_unfinished, in_use, place_of, waits_for
from k5train.ui.listing import NotHere
from k5train.ui.project import Project

__all__ = [
    "Job",
    "Wait",
    "add",
    "advance",
    "error_of",
    "find",
    "gpu_in_use",
    "in_use",
    "jobs",
    "move",
    "progress",
    "remove",
    "start_anyway",
    "stop",
    "stop_run",
    "tail",
    "waits_for",
]  # fmt: skip

WORKER, WAITER = "k5train.ui.jobs.worker", "k5train.ui.jobs.waiter"
LOCK, WAITING = ".lock", ".waiter"
_LOCK_SECONDS = 30.0
_over: dict[Path, tuple[int, Job]] = {}
"""Jobs that have ended, by their folders, with the time of the file that says so."""
_children: list[subprocess.Popen[bytes]] = []
"""What this process started. It is asked how they are, so that none of those that ended stays as a zombie."""


def jobs(project: Project) -> list[Job]:
    """Every job, the newest first. Reads only."""
    _reap()
    found = []
    for folder in job_files.job_folders(project):
        with suppress(FileNotFoundError):
            found.append(_job(folder))
    for folder in _over.keys() - {job.folder for job in found}:
        _over.pop(folder, None)
    return sorted(found, key=lambda job: (job.order, job.added or 0, job.id), reverse=True)


def find(project: Project, id: str) -> Job:
    """The job with this id.

    Raises:
        NotHere: there is none.
    """
    _reap()
    folder = job_files.job_folder(project, id)
    with suppress(FileNotFoundError):
        if folder is not None:
            return _job(folder)
    raise NotHere("There is no such job: it was removed from the list", "Choose another one from the queue")


def _job(folder: Path) -> Job:
    """A job; one that has ended is read once. Raises as ``read_job``."""
    try:
        when = (folder / job_files.ENDED).stat().st_mtime_ns
    except OSError:
        return read_job(folder)
    known = _over.get(folder)
    if known is None or known[0] != when:
        job = read_job(folder)
        if not job.is_over or job.worker is not None:
            return job
        known = _over[folder] = (when, job)
    return known[1]


def add(
    project: Project, argv: Sequence[str], label: str, kind: str, about: str,
    files: Mapping[str, str] | None = None, uses: Sequence[str] = (),
) -> Job:  # fmt: skip
    """Put a command into the queue, and begin it if a GPU is free.

    Args:
        argv: ``k5train`` or ``k5cache`` and its arguments. It runs in the project's folder. A word that begins with
            ``{job}/`` means a file of the job.
        label: what a person calls it: ``run cats``.
        kind: ``run``, ``encode``, ``diff`` ...; those of ``WITHOUT_GPU`` begin at once.
        about: what it makes or changes, as a path from the project.
        files: name -> text of files to write beside it, such as ``recipe.toml``.
        uses: what it reads, as paths from the project. It begins after the jobs about these that are there already.

    Raises:
        OutputError: the project cannot be written.
    """
    assert [*argv[:1]] in [[program] for program in PROGRAMS], argv
    with _locked(project) as queue:
        before = jobs(project)
        reads = {*uses, *job_files.within(project, list(argv)), about} - {""} if kind not in WITHOUT_GPU else set()
        after = [job.id for job in before if not job.is_over and job.needs_gpu and job.about in reads]
        order = max((job.order for job in before), default=0) + 1
        document = {
            "argv": list(argv), "label": label, "kind": kind, "about": about, "uses": list(uses), "after": after,
            "order": order, "added": now()["at"],
        }  # fmt: skip
        folder = job_files.new_folder(queue, document, files or {})
        _advance(project, queue)
    return read_job(folder)


def remove(project: Project, id: str) -> None:
    """Take a job off the list: one that waits, or one that has ended. Only its own folder is deleted.

    Raises:
        RunError: it is running, or there is none.
    """
    with _locked(project) as queue:
        job = find(project, id)
        if not job.is_over and job.state != "waiting":
            raise RunError(f"{job.label} is running", "Stop it first. The run or the cache itself stays in any case")
        job_files.remove_folder(job.folder)
        _advance(project, queue)


def move(project: Project, id: str, places: int) -> None:
    """Let a waiting job change places with those before it (``places`` below 0) or behind it.

    Raises:
        RunError: it does not wait any more.
    """
    with _locked(project) as queue:
        waiting = sorted((job for job in jobs(project) if job.state == "waiting"), key=place_of)
        at = next((number for number, job in enumerate(waiting) if job.id == id), None)
        if at is None:
            raise RunError("Only a job that waits can be moved, and this one does not wait any more", "Reload the page")
        orders = [job.order for job in waiting]
        job = waiting.pop(at)
        waiting.insert(max(0, at + places), job)
        for job, order in zip(waiting, orders, strict=True):
            if job.order != order:
                document = job_files.read(job.folder, job_files.JOB) or {}
                job_files.write(job.folder, job_files.JOB, {**document, "order": order})
        _advance(project, queue)


def start_anyway(project: Project, id: str) -> None:
    """Let a waiting job no longer wait for other jobs or for a person, only for a GPU.

    Raises:
        RunError: it does not wait any more.
    """
    with _locked(project) as queue:
        job = find(project, id)
        if job.state != "waiting":
            raise RunError(f"{job.label} does not wait any more", "Reload the page")
        document = job_files.read(job.folder, job_files.JOB) or {}
        job_files.write(job.folder, job_files.JOB, job_files.sealed(job.folder, {**document, "after": []}))
        _advance(project, queue)


def clear(project: Project) -> None:
    """Take all jobs that have ended off the list."""
    with _locked(project):
        for job in jobs(project):
            if job.is_over:
                job_files.remove_folder(job.folder)


def stop(project: Project, id: str, at_once: bool = False) -> None:
    """Tell a job to stop. A run saves its state, and an encode what it has encoded. A waiting one does not begin.

    Args:
        at_once: end it without waiting for what it would save.

    Raises:
        RunError: it is not running.
    """
    with _locked(project) as queue:
        job = find(project, id)
        if job.state == "waiting":
            problem = "It was stopped before it began"
            job_files.write(
                job.folder, job_files.ENDED, {"exit_code": None, "is_stopped": True, "problem": problem, **now()}
            )
            _advance(project, queue)
            return
        if job.is_over:
            raise RunError(f"{job.label} has ended already", "Reload the page")
        job_files.write(job.folder, job_files.STOP, {"at_once": at_once, **now()})
        if job.state == "running":  # its worker looks for the file
            return
        worker = job_files.read(job.folder, job_files.WORKER) or {}
        if job.command is not None and at_once:
            system.end_process(job.command)
        elif job.command is not None:
            system.interrupt_process(job.command, lambda: job_files.pid_of(worker.get("command")) == job.command)


def stop_run(project: Project, run: Path) -> None:
    """Tell whatever works on a run to stop, and save: a job of the queue, or a command in a terminal.

    Args:
        run: its folder. For a run of a sweep, the whole sweep is stopped.

    Raises:
        RunError: nothing works on it, or it must be stopped where it was started.
    """
    inside = project.inside(run)
    about = project.relative(run)
    for job in jobs(project):
        if job.about == about and job.state in ("running", "lost") and not job.is_over:
            stop(project, job.id)
            return
    processes.stop_holder(inside)


def advance(project: Project) -> None:
    """Begin whatever can begin. Nothing is written if nothing waits, or if nothing may be written."""
    if not project.is_writable or not any(job.state == "waiting" for job in jobs(project)):
        return
    with _locked(project) as queue:
        _advance(project, queue)


def is_waited_for(project: Project) -> bool:
    """Begin whatever can begin; whether a job still waits for a command that will not call ``advance`` at its end."""
    with _locked(project) as queue:
        return _advance(project, queue, is_waiter=True)


def gpu_in_use(project: Project) -> str | None:
    """What uses the first GPU, or the processor where there is none; None if nothing does."""
    all_slots = slots.slots()
    return in_use(project, jobs(project), all_slots).get(all_slots[0].key)


def _advance(project: Project, queue: Path, is_waiter: bool = False) -> bool:
    """Begin whatever can begin. The caller has the queue's lock. Returns as ``is_waited_for``."""
    all_jobs = jobs(project)
    waiting = sorted((job for job in all_jobs if job.state == "waiting" and job.is_ours), key=place_of)
    if not waiting:
        return False
    all_slots = slots.slots()
    used = in_use(project, all_jobs, all_slots)
    ours = {key for job in all_jobs if job.state == "running" for key in job.slots}
    others = set(used) - ours
    free = [slot for slot in all_slots if slot.key not in used]
    by_id = {job.id: job for job in all_jobs}
    left = 0
    for job in waiting:
        if first_unfinished(job, by_id):
            left += 1
            continue
        count = min(job.num_gpus, len(all_slots))  # a command that asks for more than there are says so itself
        if count > len(free):
            left += 1
            free = []  # kept for it: smaller jobs would pass it for ever
            continue
        given, free = free[:count], free[count:]
        _start(project, job, given)
    is_waited_for = bool(left and others)
    if is_waited_for and not is_waiter:
        _start_waiter(project)
    return is_waited_for


def _start(project: Project, job: Job, given: Sequence[Slot]) -> None:
    """Start the worker of a job, which starts its command, on the GPUs that it is given."""
    started = {"gpu": words_of(given), "slots": [slot.key for slot in given], **now()}
    started |= {"env": env_of(given), "launcher": job_files.process_of(os.getpid())}
    job_files.write(job.folder, job_files.STARTED, started)  # first: killed in between, it does not begin twice
    try:
        worker = _spawn(project, WORKER, str(job.folder))
    except OSError as error:
        problem = f"It could not be started: {error.strerror or error}"
        job_files.write(job.folder, job_files.ENDED, {"exit_code": None, "problem": problem, **now()})
        return
    job_files.write(job.folder, job_files.STARTED, {**started, "worker": job_files.process_of(worker.pid)})


def _start_waiter(project: Project) -> None:
    """Let a process wait for what has the GPU. If there is one already, this one ends."""
    _spawn(project, WAITER, str(project.root))


def _spawn(project: Project, module: str, argument: str) -> subprocess.Popen[bytes]:
    """Start one of our own processes in the project's folder, apart from this one."""
    silent = subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", module, argument]
    process = system.start_apart(
        command, cwd=project.root, env=system.environment(), stdin=silent, stdout=silent, stderr=silent
    )
    _children.append(process)
    return process


def _reap() -> None:
    _children[:] = [process for process in _children if process.poll() is None]


@atexit.register
def _let_go() -> None:
    """What was started goes on when this process ends, and Python need not warn of it."""
    for process in _children:
        process.returncode = process.poll() or 0


@contextmanager
def _locked(project: Project) -> Iterator[Path]:
    """Change the queue: nobody else does until the end of the block.

    Raises:
        OutputError: the project cannot be written, or another process does not let go of the queue.
    """
    check_writable(project.own / "queue")
    queue = job_files.make_queue_folder(project)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(queue / LOCK, _LOCK_SECONDS))
        except Locked as error:
            raise OutputError(
                f"The queue in {queue} is being changed by {error.owner}", "Try again; if that process hangs, end it"
            ) from None
        yield queue
