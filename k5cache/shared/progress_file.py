"""How far is long work, for a page that shows the same bars? A JSON file, written anew at most once a second.

The page's worker names the file in ``K5_PROGRESS``. It may be read at any time, and is whole; nothing is lost if it is
not written.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.progress import Progress, Task

VARIABLE = "K5_PROGRESS"
SECONDS = 1.0


class Reporter:
    """Writes the tasks of all progress displays of this process, while there are any."""

    is_display = False
    """Whether who reads it shows it in this process's place, so that no lines need be printed."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._displays: list[Progress] = []
        self._ended = Event()
        self._thread: Thread | None = None
        self._last = ""

    def add(self, display: Progress) -> None:
        """A display begins."""
        self._displays.append(display)
        if self._thread is None:
            self._ended.clear()
            self._thread = Thread(target=self._write, daemon=True)
            self._thread.start()

    def remove(self, display: Progress) -> None:
        """It has ended. With the last one, so do the bars of the page."""
        if display not in self._displays:
            return
        self._displays.remove(display)
        if not self._displays and self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            self.write()

    def _write(self) -> None:
        while not self._ended.wait(self.seconds):
            self.write()

    def write(self) -> None:
        """Write what there is now, if it is not what was written last. A disk that refuses stops no work."""
        tasks = [task for display in self._displays for task in display.tasks if task.visible and not task.finished]
        text = json.dumps({"tasks": [_of(task) for task in tasks]})
        if text == self._last:
            return
        with suppress(OSError):
            self.put(text)
            self._last = text

    def put(self, text: str) -> None:
        """Replace the file."""
        assert self.path is not None
        temporary = self.path.with_name(f"{self.path.name}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def _of(task: Task) -> dict[str, Any]:
    speed = task.finished_speed or task.speed
    left = task.time_remaining
    return {
        "name": task.description,
        "completed": task.completed,
        "total": task.total,
        "unit": str(task.fields.get("unit", "")),
        "note": str(task.fields.get("note", "")),
        "per_second": float(f"{speed:.4g}") if speed else None,
        "seconds_left": left,
    }


class _Of:
    """Of this process: its children have neither the variable nor this."""

    reporter: Reporter | None = None
    pid = 0


def take() -> None:
    """Take the variable out of the environment as a command begins: a process that it starts reports nothing."""
    if path := os.environ.pop(VARIABLE, None):
        use(Reporter(Path(path), SECONDS))


def use(reporter: Reporter) -> None:
    """Report to this one."""
    _Of.reporter, _Of.pid = reporter, os.getpid()


def reporter() -> Reporter | None:
    """Where this process reports how far it is; None if nobody asked."""
    return _Of.reporter if _Of.pid == os.getpid() else None
