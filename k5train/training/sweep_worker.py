"""One process of a sweep over several GPUs: sees one GPU, keeps the base loaded, and trains the runs it is told.

``python -m k5train.training.sweep_worker`` reads orders from stdin and answers each on stdout, a JSON object a line:

    {"do": "begin", "job": ...}      {"event": "begun", "precision": what auto means on this GPU, or null}
    {"do": "plan", "precision": ...} {"event": "planned", "host_bytes": ...}
    {"do": "load"}                   {"event": "loaded"}
    {"do": "train", "label": ...}    {"event": "ended", "label": ..., "problem": ..., "fix": ...}
    {"do": "stop"}                   as Ctrl-C: {"event": "stopped", "said": ...}, and it ends
    {"do": "hurry"}                  as a second Ctrl-C: it does not wait for what is not saved
    {"do": "end"}                    it ends

An answer may be {"event": "refused", "problem": ..., "fix": ...} instead. If whoever gives the orders is killed, it
stops as if told to, so that no run is left that nobody waits for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from k5cache.shared import console, disk_errors, interrupt, progress_file, system
from k5cache.shared.errors import K5Error
from k5cache.shared.loading import announced
from k5train.options.precision import is_open
from k5train.training.sweep_job import Job, read_job
from k5train.training.sweep_setting import train_setting

SECONDS = 0.5


class Channel:
    """Orders in, answers out. stdout is taken for the answers; what else is printed there goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._orders: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen(self) -> None:
        """Begin to take orders, when an interrupt is answered."""
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, event: str, **facts: object) -> None:
        """Send an answer. If nobody listens any more, the end of stdin says so."""
        with self._lock, suppress(OSError, ValueError):
            self._out.write(json.dumps({"event": event, **facts}) + "\n")
            self._out.flush()

    def next_order(self) -> dict[str, Any]:
        """Wait for an order."""
        while True:
            with suppress(Empty):  # not for ever at once: on Windows nothing interrupts that
                return self._orders.get(timeout=SECONDS)

    def _listen(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "stop":
                system.interrupt()
            elif order["do"] == "hurry":
                interrupt.hurry()
            else:
                self._orders.put(order)
                if order["do"] == "end":
                    return
        system.interrupt()  # the parent is gone


class Worker:
    """What this process has done so far of its job."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.job: Job | None = None
        self.base: Any = None

    def work(self) -> None:
        """Do what is ordered until the end."""
        actions: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "begin": self.begin, "plan": self.plan, "load": self.load, "train": self.train,
        }  # fmt: skip
        while (order := self.channel.next_order())["do"] != "end":
            try:
                actions[order["do"]](order)
            except Exception as error:
                self.channel.say("refused", **_for_a_person(error))

    def begin(self, order: Mapping[str, Any]) -> None:
        """Read the job; ask the GPU which precision it would take, if that is open."""
        from k5train.forward.precision import chosen

        self.job = read_job(order["job"])
        configs = [run.config for run in self.job.sweep_runs]
        self.channel.say("begun", precision=chosen(configs) if any(map(is_open, configs)) else None)

    def plan(self, order: Mapping[str, Any]) -> None:
        """Plan the shared base for this GPU."""
        from k5train.training.shared_base import share_base  # torch is imported here

        assert self.job is not None
        if order["precision"]:
            self.job = self.job.with_precision(order["precision"])
        self.base = share_base(self.job.place, self.job.sweep_runs, self.job.saved_plan)
        self.channel.say("planned", host_bytes=self.base.plan(self._data()).host_bytes)

    def load(self, order: Mapping[str, Any]) -> None:
        """Load the base, with which every run is trained."""
        self.base.load(self._data())
        self.channel.say("loaded")

    def train(self, order: Mapping[str, Any]) -> None:
        """Train one run. Whatever a person can correct ends only that run."""
        assert self.job is not None
        run = next(run for run in self.job.sweep_runs if run.label == order["label"])
        answer: dict[str, str | None] = {"problem": None, "fix": None}
        try:
            train_setting(self.job.place, run, self.base)
        except Exception as error:
            answer |= _for_a_person(error)
        self.channel.say("ended", label=run.label, **answer)

    def _data(self) -> Any:
        from k5train.training.start import open_data

        assert self.job is not None
        return open_data(self.job.place.cache, self.job.sweep_runs[0].config)


def _for_a_person(error: Exception) -> dict[str, str]:
    """Problem and fix, for an answer. An error that nobody can correct rises, and ends this process."""
    if isinstance(error, K5Error):
        return {"problem": error.problem, "fix": error.fix}
    sentence = disk_errors.sentence(error)
    if sentence is None:
        raise error
    return {"problem": sentence[0], "fix": sentence[1]}


class _Sender(progress_file.Reporter):
    """Tells the parent how far this process is, which shows it."""

    is_display = True

    def __init__(self, channel: Channel, seconds: float) -> None:
        super().__init__(None, seconds)
        self._channel = channel

    def put(self, text: str) -> None:
        self._channel.say("progress", **json.loads(text))


def main() -> None:
    """Carry out orders until told to end, or until stopped."""
    channel = Channel()
    console.quiet_libraries()
    progress_file.use(_Sender(channel, progress_file.SECONDS))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where nohup has it ignored: "stop" is sent as one
    try:
        with interrupt.installed(), interrupt.counted_once(), announced(console.note):
            channel.listen()
            Worker(channel).work()
    except KeyboardInterrupt as stopped:
        channel.say("stopped", said=str(stopped))
        sys.exit(console.STOPPED)


if __name__ == "__main__":
    main()
