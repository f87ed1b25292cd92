"""The page in a real browser: every page at three widths, light and dark, and whole ways through it by clicks alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser import SCHEMES, WIDTHS, browser, context_of, hard_to_read, wider_than_its_window

__all__ = ["browser"]  # the fixture
ROOT = Path(__file__).parent.parent


class Served:
    """``k5train ui`` over a folder, in a process of its own, as a user starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        """Start it, again on the port that it had."""
        command = [sys.executable, "-m", "k5train", "ui", "--port", str(self.port), "--folder", str(self.folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Served]]:
    """``serve(folder)``; what it started is ended after the test."""
    started: list[Served] = []

    def start(folder: Path) -> Served:
        started.append(Served(folder))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.stop()


PAGES = ("",)


def look_at_every_page(browser, url: str, pages: tuple[str, ...]) -> list[str]:
    """What is wrong with pages, at a phone's width and a laptop's, light and dark."""
    problems = []
    for scheme in SCHEMES:
        for width in list(WIDTHS)[:2]:
            with context_of(browser, url, width, scheme) as context:
                page = context.new_page()
                for path in pages:
                    page.goto(url + path)
                    wrong = (*wider_than_its_window(page), *hard_to_read(page))
                    problems += [f"/{path} at {width} px, {scheme}: {what}" for what in wrong]
    return problems


def test_an_empty_project_can_be_read_at_every_width_light_and_dark(browser, serve, tmp_path):
    assert look_at_every_page(browser, serve(tmp_path).url, PAGES) == []
