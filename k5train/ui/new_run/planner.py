"""Who plans for the page? One process with torch: begun when first needed, one question at a time, the newest wins."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5train.ui.jobs.slots import AMD, NVIDIA, Slot
from k5train.ui.new_run.planner_process import Question

_IDLE, _IDLE_ON_GPU = 60, 15
"""Seconds without a question after which the process ends. On a GPU it holds memory that a run might want."""
_MOST_KEPT = 8  # answers
COMMAND = [sys.executable, "-P", "-m", "k5train.ui.new_run.planner_process"]
"""``-P``: a file of the project's named random.py is not imported."""


class Planner:
    """The process, if there is one.

    Args:
        folder: the project's, in which paths of recipes are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._env: Mapping[str, str] = {}
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._newest = 0
        self._is_timing = self._is_closed = False
        self._kept: dict[str, dict[str, Any]] = {}

    def ask(self, question: Question, slot: Slot | None) -> Mapping[str, Any] | None:
        """The answer; None if a newer question came meanwhile.

        Blocks until an earlier plan is made, and while the process begins, which takes seconds. A time that is being
        measured is not waited for: it may take a minute.

        Args:
            slot: the GPU that the process may use, or the processor. None: it sees no GPU, because runs use all.
        """
        with self._lock:
            self._newest += 1
            number, is_in_the_way = self._newest, self._is_timing
        if is_in_the_way:
            self._kill()
        with self._turn:
            if number != self._newest:
                return None
            env = {AMD: "", NVIDIA: ""} if slot is None else slot.env
            line = json.dumps(asdict(question))
            reply = self._kept.get(_key(line, env)) or self._asked(line, env, question.is_timed)
            if number != self._newest:
                return None
            if "problem" not in reply:  # which may be mended without a change of the recipe
                while len(self._kept) >= _MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[_key(line, env)] = reply
            return reply

    def end(self) -> None:
        """End the process, so that the memory it holds is free for a run."""
        with self._lock:
            self._newest += 1
            self._kept.clear()
        self._kill()

    def close(self) -> None:
        """End the process, and begin none any more: the page ends."""
        self._is_closed = True
        self.end()

    def _asked(self, line: str, env: Mapping[str, str], is_timed: bool) -> dict[str, Any]:
        self._is_timing, code = is_timed, 0
        try:
            for _ in range(2):  # a process that has just ended, after its idle time, is begun anew
                process = self._begun(env)
                if process is None:
                    return {"problem": ["The page has ended", "Start it again: k5train ui"]}
                reply = _exchange(process, line)
                if reply is not None:
                    return reply
                if (code := process.wait()) != 0:  # by itself it ends with 0
                    break
        finally:
            self._is_timing = False
        return {"problem": [f"The planner ended with exit code {code}", "Try k5train plan in a terminal"]}

    def _begun(self, env: Mapping[str, str]) -> subprocess.Popen[str] | None:
        if self._process and (self._process.poll() is not None or self._env != env):
            self._kill()
        with self._lock:
            if self._process is None and not self._is_closed:
                seconds = _IDLE_ON_GPU if any(env.values()) else _IDLE
                self._env = env
                self._process = subprocess.Popen(
                    [*COMMAND, str(seconds)],
                    cwd=self._folder,
                    env={**system.environment(), **env, "HF_HUB_OFFLINE": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                )
            return self._process

    def _kill(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not sent is of no use any more
                    pipe.close() if pipe else None


def _key(line: str, env: Mapping[str, str]) -> str:
    return f"{sorted(env.items())} {line}"


def _exchange(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """The answer to a question; None if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        reply: dict[str, Any] = json.loads(process.stdout.readline())
        return reply
    except (OSError, ValueError):  # the pipe is broken or closed, or the answer is cut off
        return None
