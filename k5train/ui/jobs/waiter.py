"""Waits until a GPU is free that a command in a terminal has, and lets the next job begin. One process for a queue.

A worker lets the next job begin when its own job ends. Nobody tells the queue when another command does.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

from k5cache.shared.lock import Locked, lock_file
from k5train.ui.jobs import queue
from k5train.ui.project import Project

SECONDS = 3.0


def wait(project: Project, seconds: float = SECONDS) -> None:
    """Look every few seconds, until no job waits or those that run will go on by themselves."""
    lock = project.own / "queue" / queue.WAITING
    # One that is about to end has decided so before this one was started: it is waited for.
    with suppress(Locked, FileNotFoundError), lock_file(lock, wait_seconds=2 * seconds):
        while queue.is_waited_for(project):
            time.sleep(seconds)


def main() -> None:
    """Wait for the project that the command line names."""
    wait(Project(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
