"""Workers as the tests of the queue start them: their commands are a line of Python, with as many GPUs as said.

A job ``("k5train", "run", CODE)`` runs CODE. ``python -m tests.fake_jobs FOLDER`` is a worker, or a waiter if FOLDER is
a project.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from k5train.ui.jobs import processes, queue, slots, waiter, waits, worker

GPUS = "FAKE_GPUS"
OTHERS = "FAKE_OTHERS"
"""A file: while it is there, a command in a terminal has GPU 0."""
ME = "tests.fake_jobs"


def gpus(*env: object) -> tuple[slots.Slot, ...]:
    count = int(os.environ.get(GPUS, "1"))
    return tuple(slots.Slot(f"GPU-{n}abc", n, "a GPU", slots.NVIDIA) for n in range(count)) or (slots.PROCESSOR,)


def external(*args: object) -> list[processes.Process]:
    is_there = Path(os.environ.get(OTHERS, "/nowhere")).exists()
    return [processes.Process(7, ("k5train", "sample", "runs/a"), {})] if is_there else []


def command_of(argv: list[str]) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", argv[2]]


if __name__ == "__main__":
    queue.WORKER = queue.WAITER = ME
    waits.external, slots.slots, worker.command_of = external, gpus, command_of
    worker.SECONDS = 0.02
    if (Path(sys.argv[1]) / ".k5").is_dir():
        waiter.wait(queue.Project(Path(sys.argv[1])), 0.1)
    else:
        worker.main()
