"""Where do a run's measurements go? To ``metrics.jsonl``, one JSON line at a time, and to every tracker."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from k5cache.shared import console, system
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import RunError
from k5cache.shared.files import write_whole
from k5cache.shared.sealed import Digest

if TYPE_CHECKING:
    from PIL import Image

    from k5train.runs.trackers import Tracker


class Metrics:
    """Appends JSON lines. Each line is passed to the operating system before the next step.

    Args:
        path: ``metrics.jsonl``.
        step: updates done before this start.
        trackers: get the same numbers.
        written: from ``Metrics.written`` when the state of ``step`` was saved. What follows, which a crash undid, is
            cut off. None: no state was saved, or an earlier version saved it.

    Raises:
        RunError: as ``check_metrics``.
    """

    def __init__(
        self, path: Path, step: int = 0, trackers: Sequence[Tracker] = (), written: Digest | None = None
    ) -> None:
        self.path, self.trackers = path, trackers
        kept = _cut(path, step, written)
        self._digest, self._num_bytes = hashlib.sha256(kept), len(kept)
        self._fd = system.open_bytes(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, is_followed=False)

    def write(self, *, step: int, **values: Any) -> None:
        """Append one line. Floats keep all their digits; NaN and infinity, which JSON does not have, become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._append((json.dumps({"step": step, **clean}) + "\n").encode())
        for tracker in self.trackers:
            tracker.log(step, _numbers(clean))

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Give pictures to the trackers, by caption. On disk they have files of their own."""
        for tracker in self.trackers:
            tracker.pictures(step, pictures)

    def written(self) -> Digest:
        """What the file is now, once it is on disk. It is saved in a state, which relies on the lines until then."""
        with named(self.path):
            os.fsync(self._fd)
        return Digest(self._num_bytes, self._digest.hexdigest())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)
        for tracker in self.trackers:
            tracker.close()

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            error.filename = str(self.path)
            with suppress(OSError):
                os.ftruncate(self._fd, self._num_bytes)  # no half line: the state saved after this error counts bytes
            raise
        self._digest.update(line)
        self._num_bytes += len(line)


class Unwritten(Metrics):
    """Takes measurements and keeps none, for a process that leaves writing to another one."""

    def __init__(self) -> None:
        self.trackers = ()

    def write(self, *, step: int, **values: Any) -> None:
        """Nothing."""

    def written(self) -> Digest:
        """Of nothing."""
        return Digest(0, hashlib.sha256().hexdigest())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing is open."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``. A last line that a crash cut off is left out.

    Raises:
        RunError: another line is damaged; says which.
    """
    *lines, last = path.read_bytes().split(b"\n")
    try:
        rows = [_row(line) for line in lines]
    except ValueError:
        raise _damaged(path, lines) from None
    with suppress(ValueError):
        rows.append(_row(last))
    return rows


def curve(rows: Sequence[dict[str, Any]], name: str, part: int | None = None) -> list[tuple[float, float | None]]:
    """A field over the steps: of every line that has it, the step and the value.

    Args:
        part: for a field that is a list, which of its values. Lines with a shorter list have none.

    Returns:
        None stands for what is no number: null, which NaN became.
    """
    given = [(row["step"], row[name]) for row in rows if name in row]
    if part is not None:
        given = [
            (step, value[part] if isinstance(value, list) and part < len(value) else None) for step, value in given
        ]
    return [(step, value if isinstance(value, int | float) else None) for step, value in given]


def check_metrics(path: Path, written: Digest | None) -> None:
    """Compare the beginning of the file with what it was when a state was saved.

    Args:
        written: None: an earlier version saved the state, and only the form of the lines is checked.

    Raises:
        RunError: it has changed; names the line if that can be told.
    """
    if not path.exists():
        return
    if written is None:
        read_metrics(path)
        return
    raw = path.read_bytes()[: written.num_bytes]
    if Digest(len(raw), hashlib.sha256(raw).hexdigest()) != written:
        raise _damaged(path, raw.split(b"\n")[:-1])


def _cut(path: Path, step: int, written: Digest | None) -> bytes:
    """Remove what was written after the state that the run goes on from, and return the rest."""
    if not path.exists():
        if step:
            console.note(f"{path} is not there: it will have the steps from {step + 1} on")
        return b""
    if not step and written is None:
        size = 0
    elif written is None:
        return _cut_by_step(path, step)
    else:
        check_metrics(path, written)
        size = written.num_bytes
    if path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    return path.read_bytes()


def _cut_by_step(path: Path, step: int) -> bytes:
    """Remove the lines beyond ``step``. A held-out loss of that step itself stays: it belongs to the saved adapter."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if raw != path.read_bytes():
        write_whole(path, lambda temporary: temporary.write_bytes(raw))
    return raw


def _row(line: bytes) -> dict[str, Any]:
    """One line.

    Raises:
        ValueError: it is not a line that ``Metrics.write`` writes.
    """
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError("no step")
    if not all(isinstance(row.get(name, 0.0), float | int | None) for name in ("loss", "held_out_loss")):
        raise ValueError("a loss that is no number")
    return row


def _damaged(path: Path, lines: Sequence[bytes]) -> RunError:
    """The error for a file that has changed. Names the first line that cannot be read, if there is one."""
    where = f"{path}"
    for number, line in enumerate(lines, 1):
        try:
            _row(line)
        except ValueError:
            where = f"{path}, line {number},"
            break
    return RunError(
        f"{where} is not what the run wrote",
        f"To go on without the losses so far: {console.command('mv', path, f'{path}.damaged')}",
    )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """What a tracker can draw: numbers, and the numbers of a list, each under its own name. No row numbers."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if name == "rows":
            continue
        if isinstance(value, int | float):
            flat[name] = value
        elif isinstance(value, list):
            flat |= {f"{name}/{i}": v for i, v in enumerate(value) if isinstance(v, int | float)}
    return flat
