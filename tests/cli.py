"""Run a command line in this process, as a user would: arguments in, exit code, stdout and stderr out."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from k5cache.shared import console


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


class Cli:
    """Runs commands in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, app: Callable[..., object], *arguments: str, stdin: TextIO | None = None) -> Done:
        """``stdin``: what the user types or pipes in; None: nothing."""
        out, err = io.StringIO(), io.StringIO()
        with _inside(self.folder), _reading(stdin or io.StringIO()), _consoles(out, err), _argv(arguments):
            code = 0
            try:
                console.run(app)
            except SystemExit as end:
                code = int(end.code or 0)
        return Done(code, out.getvalue(), err.getvalue())


@contextmanager
def _inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _reading(stdin: TextIO):
    before, sys.stdin = sys.stdin, stdin
    try:
        yield
    finally:
        sys.stdin = before


@contextmanager
def _consoles(out: io.StringIO, err: io.StringIO):
    console.out.file, console.err.file = out, err
    stdout, stderr, sys.stdout, sys.stderr = sys.stdout, sys.stderr, out, err
    try:
        yield
    finally:
        console.out._file = console.err._file = None  # back to sys.stdout and sys.stderr, whatever they are
        sys.stdout, sys.stderr = stdout, stderr


@contextmanager
def _argv(arguments: tuple[str, ...]):
    before, sys.argv = sys.argv, ["command", *arguments]
    try:
        yield
    finally:
        sys.argv = before
