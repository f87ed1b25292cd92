"""What does the user see? The result on stdout, progress and errors on stderr. Both command lines use this."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from k5cache.shared import disk_errors, interrupt, progress_file
from k5cache.shared.command_line import command as command
from k5cache.shared.command_line import this_command as this_command
from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import K5Error
from k5cache.shared.foreign import Terminal
from k5cache.shared.help import Grouped
from k5cache.shared.loading import announced
from k5cache.shared.progress import Bars, Lines
from k5cache.shared.progress import doing as doing
from k5cache.shared.units import human_bytes as human_bytes
from k5cache.shared.units import human_seconds as human_seconds
from k5cache.shared.urls import with_urls

out = Terminal()
err = Terminal(stderr=True)
STOPPED = 130
"""The exit code of a command that was stopped, as shells and typer have it."""


def run(app: Callable[[], object]) -> NoReturn:
    """Run a command line to its end: exit 0, 2 for an error that the user can correct, 130 for Ctrl-C and SIGTERM.

    Args:
        app: a ``typer.Typer`` with ``cls=Commands``, which answers interrupts.
    """
    quiet_libraries()
    progress_file.take()
    try:
        with interrupt.installed(), _output_arrives(), announced(note):
            app()
    except K5Error as error:
        print_error(error.problem, error.fix)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after the command
        err.print("Stopped", style="yellow")
        sys.exit(STOPPED)
    except Exception as error:
        answer = disk_errors.sentence(error)
        if answer is None:
            raise
        print_error(*answer)
        sys.exit(2)
    sys.exit(0)


class Commands(Grouped):
    """A group of commands that ends with one line if it is stopped. typer's own groups end without a word."""

    farewell = "Stopped"

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; print one line if it was stopped, by Ctrl-C, SIGTERM or no answer to a question."""
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            if end.code == STOPPED:
                err.print(Text(self.farewell, style="yellow"))
            raise

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command, and note what an interrupt says."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort) as stopped:
            self.farewell = str(stopped) or self.farewell
            raise typer.Exit(STOPPED) from None


@contextmanager
def _output_arrives() -> Iterator[None]:
    """Write out what is printed while somebody can be told that it cannot be. After `| head` it is dropped."""
    try:
        yield
    finally:
        try:
            if sys.stdout is not None:  # None where it is closed: `>&-`
                sys.stdout.flush()
        except OSError as error:
            # At exit Python writes what is left once more. It must not fail there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
            sys.exit(1)


def quiet_libraries() -> None:
    """Hide two remarks of libraries that do not concern the user."""
    # torch says this once on CPUs in bf16; the pipeline computes the same norm.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # peft imports bitsandbytes if it is installed, which then misses its own 4-bit kernel on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


_WINDOWS_PATH = re.compile(r"(?<![\w/])([A-Za-z]):[\\/]")


def print_error(problem: str, fix: str) -> None:
    """Two lines on stderr, and a third about a Windows path where there is no Windows. Nothing is read as markup."""
    problem, fix = without_credentials(problem), without_credentials(fix)  # a library may repeat what it was given
    err.print(Text.assemble(("error: ", "bold red"), problem))
    err.print(Text.assemble(("  fix: ", "bold"), fix))
    path = _WINDOWS_PATH.search(problem)
    if path and os.name != "nt":
        drive = path[1].upper()
        note = f"{path[0]} begins a Windows path: in WSL, drive {drive}: is /mnt/{drive.lower()}"
        err.print(Text.assemble((" note: ", "bold"), note))


def note(message: str, style: str = "dim") -> None:
    """One line of progress on stderr; ``message`` is plain text."""
    err.print(Text(message, style=style))


def warn(message: str) -> None:
    """One line that a person should not miss, on stderr."""
    err.print(Text.assemble(("warning: ", "bold yellow"), message))


def next_step(message: str, command: str) -> None:
    """The line that ends a success: what to run next, with the user's own paths."""
    out.print(Text.assemble((f"{message}: ", "bold"), (command, "cyan")))


def print_json(value: object) -> None:
    """One JSON object on stdout, for scripts; dataclasses as objects, paths as strings."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return str(value)

    print(
        with_urls(json.dumps(value, default=plain, indent=1)), file=out.file
    )  # not through rich: it would wrap and colour


def table(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """The one table style. ``numbers`` names the columns that are right-aligned."""
    rich_table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        rich_table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return rich_table


def progress() -> Progress:
    """A progress display on stderr: bars, or a line a minute where there is no terminal. See ``shared/progress.py``."""
    if (reporter := progress_file.reporter()) and reporter.is_display:
        return Lines(lambda line: None)
    return Bars(err) if err.is_terminal and not err.is_dumb_terminal else Lines(note)


@contextmanager
def working(activity: str) -> Iterator[None]:
    """Show ``activity`` while the block runs, which has no progress display of its own."""
    with progress() as bars, doing(bars, activity):
        yield


def parse_bytes(text: str) -> int:
    """``"4GB"``, ``"4 GiB"``, ``"4"`` or ``"3500MB"`` to bytes. A card of "4 GB" has 4 GiB: both mean 2**30 here.

    Raises:
        ValueError: it is not an amount of memory.
    """
    words = text.strip().lower().removesuffix("b").removesuffix("i").strip()
    unit = {"g": 2**30, "m": 2**20}.get(words[-1:])
    number = float(words[:-1] if unit else words)
    if not 0 < number < 1e6 or number * (unit or 2**30) < 1:
        raise ValueError(text)
    return int(number * (unit or 2**30))
