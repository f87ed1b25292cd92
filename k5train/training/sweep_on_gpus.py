"""A sweep over several GPUs: a process on each, and who is done first gets the next run. Imports no torch.

This process makes no CUDA context and loads nothing. The workers (``sweep_worker.py``) plan together before any of them
loads, because they share the host memory. One that is lost costs the run it was training, and is started again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from rich.progress import TaskID

from k5cache.shared import console, system
from k5cache.shared.errors import K5Error, RunError
from k5cache.shared.gpus import Slot
from k5cache.shared.host_memory import free_ram
from k5train.options.train import BaseModelPrecision
from k5train.planning.host_memory import check_host_memory
from k5train.training.gpu_process import Event, GpuProcess, module
from k5train.training.sweep_job import Job

WORKER = module("k5train.training.sweep_worker")
SECONDS = 0.5
SECONDS_TO_END = 20.0
MOST_DEATHS = 2
"""A GPU on which so many processes in a row were lost is not used any more."""

Worker = GpuProcess


class Crew:
    """The workers of a sweep, and what each does.

    Args:
        job: the whole sweep.
        labels: of the runs that are to be trained, in order.
        decided: called with the precision that ``auto`` means on all of these GPUs, or None if it was not open.
        ended: called with a run's label when it has ended, and with what ended it.
    """

    def __init__(
        self,
        job: Job,
        labels: Sequence[str],
        decided: Callable[[BaseModelPrecision | None], object],
        ended: Callable[[str, K5Error | None], object],
    ) -> None:
        self.job, self.labels, self.decided, self.ended = job, labels, decided, ended
        self.left = deque(labels)
        self.training: dict[Worker, str] = {}
        self.states: dict[Worker, str] = {}
        """What each worker has answered last. A worker is in it until it is gone, or sent away."""
        self.answers: dict[Worker, Mapping[str, Any]] = {}
        self.refusals: dict[str, K5Error] = {}
        self.deaths: Counter[str] = Counter()
        self.precision: BaseModelPrecision | None = None
        self.is_decided = self.is_planned = self.is_stopping = False
        self.stopped: dict[str, str] = {}
        """Label -> what is saved of a run that was stopped."""
        self._all: list[Worker] = []
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._said: set[str] = set()
        self._threads: Mapping[str, str] = {}
        self._tasks: dict[tuple[Worker, str], TaskID] = {}

    def run(self, gpus: Sequence[Slot]) -> None:
        """Train every run.

        Raises:
            DoesNotFit: no GPU has room, or the host memory is too small for all workers together.
            K5Error: no worker could begin.
            KeyboardInterrupt: stopped, by Ctrl-C or because a worker was. Says what is saved.
        """
        self._threads = system.shared_threads(len(gpus))
        with console.progress() as self.bars:
            self.total = self.bars.add_task("sweep", total=len(self.labels), unit="run", note="")
            try:
                for gpu, name in zip(gpus, names_of(gpus), strict=True):
                    self.start(gpu, name)
                while self.states:
                    self.take_event()
                    self.go_on()
            except KeyboardInterrupt as stopped:
                self.stop()
                raise KeyboardInterrupt(self.what_is_saved()) from stopped
            except Exception:  # nothing is left of it for the runs that are being trained: they can go on
                self.stop()
                raise
            finally:
                self.end_all()
        self.report_what_was_not_begun()

    def start(self, gpu: Slot, name: str) -> None:
        """Start a worker."""
        worker = GpuProcess(WORKER, gpu, name, self._events.put, self._threads)
        self._all.append(worker)
        self.states[worker] = "starting"
        worker.order("begin", job=self.job.to_json())

    def take_event(self) -> None:
        """Wait a moment for one, and act on it."""
        try:
            event = self._events.get(timeout=SECONDS)
        except Empty:
            return
        actions: Mapping[str, Callable[[Worker, Mapping[str, Any]], object]] = {
            "line": self.on_line, "progress": self.on_progress, "ended": self.on_ended, "refused": self.on_refused,
            "stopped": self.on_stopped, "gone": self.on_gone,
        }  # fmt: skip
        if event.kind in actions:
            actions[event.kind](event.worker, event.facts)
        elif event.worker in self.states:
            self.states[event.worker], self.answers[event.worker] = event.kind, event.facts

    def go_on(self) -> None:
        """Give every worker its next order, if it waits for one."""
        if self.is_stopping:
            return
        if not self.is_decided and self._all_are("begun"):
            self.is_decided = True
            self.precision = together([self.answers[worker]["precision"] for worker in self.states])
            self.decided(self.precision)
        if self.is_decided and not self.is_planned and self._all_are("planned"):
            self.is_planned = True
            for name, error in self.refusals.items():
                self._warn_of(name, error)
            check_host_memory([self.answers[worker]["host_bytes"] for worker in self.states], free_ram())
        for worker, state in list(self.states.items()):
            if state == "begun" and self.is_decided:
                self._order(worker, "plan", precision=self.precision)
            elif state == "planned" and self.is_planned:
                self._order(worker, "load")
            elif state in ("loaded", "ended"):
                self.give_next(worker)

    def give_next(self, worker: Worker) -> None:
        """Give a worker the next run; without one, send it away."""
        if not self.left:
            self.send_away(worker)
            return
        label = self.left.popleft()
        number = [run.label for run in self.job.sweep_runs].index(label) + 1
        console.note(f"Run {number} of {len(self.job.sweep_runs)}, on {worker.name}: {label}", "bold")
        self.training[worker] = label
        self._order(worker, "train", label=label)

    def on_ended(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """A run has ended."""
        self.deaths[worker.gpu.key] = 0
        error = RunError(facts["problem"], facts["fix"]) if facts["problem"] else None
        label = self._taken_from(worker, error)
        try:
            if worker in self.states:
                self.states[worker] = "ended"
                self.go_on()  # first: what follows removes saved states, which takes seconds on a slow disk
        finally:
            self._note_end(label, error)

    def on_refused(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """A worker cannot begin: there is no room, say. The others go on without it; without any, that is the error."""
        error = RunError(facts["problem"], facts["fix"])
        self.refusals[worker.name] = error
        self.send_away(worker)
        if not self.states and len(self.left) == len(self.labels) and not self.is_stopping:
            raise error
        if self.is_planned:
            self._warn_of(worker.name, error)

    def on_stopped(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """A worker has stopped and saved: because it was told to, or because somebody stopped it, as the page can."""
        self.states.pop(worker, None)  # it ends by itself
        if label := self.training.pop(worker, None):
            said = facts["said"].partition(". Go on with")[0].removeprefix("Stopped")
            self.stopped[label] = said.strip(" ,").removeprefix("and ") or "stopped before its first step"
        if not self.is_stopping:
            raise KeyboardInterrupt

    def on_gone(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """A process has ended. If nobody sent it away, it was lost: start another one, if there is work for it."""
        self._forget_tasks(worker)
        label = self.training.get(worker)
        if worker not in self.states:
            return
        del self.states[worker]
        if self.is_stopping:
            return
        self.deaths[worker.gpu.key] += 1
        if label:
            fix = "The same command goes on with it, from the last state that it saved"
            error = RunError(f"it was not finished on {worker.name}: {worker.how_it_ended}", fix)
            self._note_end(self._taken_from(worker, error), error)
        else:
            console.warn(f"{worker.name} was lost before it could train: {worker.how_it_ended}")
        if self.left and self.deaths[worker.gpu.key] < MOST_DEATHS:
            self.start(worker.gpu, worker.name)

    def on_line(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """Print a line of a worker. What several say before their first run, such as their plan, is printed once."""
        text = facts["text"]
        if worker not in self.training:
            if text in self._said:
                return
            self._said.add(text)
        line = text.removeprefix("warning: ")
        (console.warn if line != text else console.note)(f"{worker.name}: {line}")

    def on_progress(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """Show the bars of a worker among those of all."""
        tasks = {task["name"]: task for task in facts["tasks"]}
        for key in [key for key in self._tasks if key[0] is worker and key[1] not in tasks]:
            self.bars.remove_task(self._tasks.pop(key))
        for name, task in tasks.items():
            if (worker, name) not in self._tasks:
                self._tasks[worker, name] = self.bars.add_task(
                    f"{worker.name}: {name}", total=task["total"], completed=task["completed"], unit=task["unit"],
                    note=task["note"],
                )  # fmt: skip
            self.bars.update(
                self._tasks[worker, name], completed=task["completed"], total=task["total"], note=task["note"]
            )

    def send_away(self, worker: Worker) -> None:
        """Let a worker end by itself."""
        worker.order("end")
        self.states.pop(worker, None)

    def stop(self) -> None:
        """Tell all to stop, and wait for what they save. A second Ctrl-C does not wait for that, a third not at all."""
        self.is_stopping = True
        for attempt in range(3):
            with suppress(KeyboardInterrupt):
                if self.training and not attempt:
                    console.note("Stopping: each run saves its state first", "yellow")
                for worker in list(self.states):
                    worker.order(("stop", "hurry")[attempt]) if attempt < 2 else worker.kill()
                if self._have_ended(SECONDS_TO_END):
                    return
                if attempt == 0:
                    names = ", ".join(worker.name for worker in self.states)
                    console.warn(f"Still waiting for {names} to stop. Ctrl-C again does not wait for what is not saved")
                    self._have_ended(None)
                return  # end_all ends those that are left

    def _have_ended(self, seconds: float | None) -> bool:
        """Wait for the workers to end, for so long at most. Whether all of them have."""
        deadline = time.monotonic() + seconds if seconds else None
        while self.states and (deadline is None or time.monotonic() < deadline):
            self.take_event()
        return not self.states

    def end_all(self) -> None:
        """Let the workers end by themselves, and end those that do not: at once if they were told to stop before."""
        try:
            for worker in self._all:
                worker.kill() if worker in self.states and self.is_stopping else worker.close()
            deadline = time.monotonic() + SECONDS_TO_END
            for worker in self._all:
                worker.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:  # a Ctrl-C more: nobody is left to end them later
            for worker in self._all:
                worker.kill()
            raise

    def what_is_saved(self) -> str:
        """One sentence about the runs that were being trained."""
        for label in self.training.values():  # lost while all stopped
            self.stopped.setdefault(label, "the last step that was saved stays")
        return "; ".join(["Stopped", *(f"{label}: {said}" for label, said in self.stopped.items())])

    def report_what_was_not_begun(self) -> None:
        """Runs are left if every GPU was given up."""
        if self.left and not self.is_planned:  # the others were lost before this could be said
            for name, error in self.refusals.items():
                self._warn_of(name, error)
        while self.left:
            fix = "What became of each GPU is said above. The same command goes on"
            self.ended(self.left.popleft(), RunError("not begun: no GPU was left that could train it", fix))

    def _warn_of(self, name: str, error: K5Error) -> None:
        console.warn(f"{name} is not used: {error.problem}. {error.fix}")

    def _taken_from(self, worker: Worker, error: K5Error | None) -> str:
        """The run that a worker trained until now. Says what ended it, if that is an error."""
        label = self.training.pop(worker)
        if error is not None:
            console.warn(f"{label}: {error.problem}. {error.fix}")
        return label

    def _note_end(self, label: str, error: K5Error | None) -> None:
        try:
            self.ended(label, error)
        except Exception as problem:
            if not self.is_stopping:
                raise
            console.warn(f"{label}: how it ended is not noted: {problem}")  # the others still save
        self.bars.advance(self.total)

    def _order(self, worker: Worker, what: str, **facts: object) -> None:
        self.states[worker] = "working"
        worker.order(what, **facts)

    def _all_are(self, state: str) -> bool:
        return bool(self.states) and all(known == state for known in self.states.values())

    def _forget_tasks(self, worker: Worker) -> None:
        self.on_progress(worker, {"tasks": []})


def together(precisions: Sequence[BaseModelPrecision | None]) -> BaseModelPrecision | None:
    """What ``auto`` means for runs on several GPUs: the tensor cores only if all of them have such."""
    known = [precision for precision in precisions if precision is not None]
    if not known:
        return None
    return "int8-dynamic" if all(precision == "int8-dynamic" for precision in known) else "int8-quanto"


def names_of(gpus: Sequence[Slot]) -> list[str]:
    """What a person calls each of them. The parts of a divided GPU have its number, and are counted."""
    words = [gpu.words for gpu in gpus]
    counts: Counter[str] = Counter()
    names = []
    for word in words:
        counts[word] += 1
        names.append(word if words.count(word) == 1 else f"{word}, part {counts[word]}")
    return names
