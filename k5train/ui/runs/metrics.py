"""What has a run measured so far? Its ``metrics.jsonl``, followed while it grows, in as many rows as a page can draw.

A look at a file that has not changed costs a ``stat``; at one that has grown, only the new bytes are read. A long run
has more lines than a chart has pixels, so that neighbouring steps are merged into their mean.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

from k5cache.shared.plain import open_plain

MOST_ROWS = 1000
"""Steps are merged so that there are no more rows of them, and no more measurements."""
_MOST_STEP = 10**12
_MOST_VALUE = 1e300
_MOST_PARTS = 64  # values in a list, such as a loss by parts of sigma
_RECENT = 50
_CHECKED = 64  # bytes before the place that was read to: if they differ, the file is another one
_MOST_FOLLOWED = 64
_CHUNK = 8 << 20
_LARGEST = ("peak_reserved_gib", "peak_allocated_gib")  # of these the largest counts, and not the mean

Row = dict[str, Any]


@dataclass(frozen=True)
class Lines:
    """What a ``metrics.jsonl`` says."""

    rows: tuple[Row, ...] = ()
    """Steps, merged, and measurements, in order."""
    steps_per_row: int = 1
    """How many steps one is the mean of."""
    last: Mapping[str, Any] | None = None
    """The line of the last step."""
    seconds: float | None = None
    """Of a step: the median of the last fifty."""
    waited: float | None = None
    """Which share of these it waited for data."""
    num_broken: int = 0
    """Lines that are none of ours, which are passed over."""
    first_broken: int | None = None
    """The number of the first of them, from 1."""


class Follower:
    """Reads one ``metrics.jsonl`` as it grows. Several threads may ask."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._begin()

    def _begin(self) -> None:
        self._read, self._before = 0, b""
        self._stamp = (0, 0, 0, 0)
        self._steps: list[Row] = []
        self._group: list[Row] = []
        self._measured: list[Row] = []
        self._every, self._num_lines, self._num_broken = 1, 0, 0
        self._first_broken: int | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._last: Row | None = None
        self._lines = Lines()

    def lines(self) -> Lines:
        """What the file says now; nothing if there is none.

        Raises:
            OSError: it cannot be read.
        """
        with self._lock:
            try:
                status = self.path.stat()
            except FileNotFoundError:
                self._begin()
                return self._lines
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return self._lines
            with open_plain(self.path) as file:
                if stamp[:2] != self._stamp[:2] or status.st_size < self._read or not self._goes_on(file):
                    self._begin()
                if self._take_all(file):
                    self._lines = self._now()
            self._stamp = stamp
            return self._lines

    def _goes_on(self, file: Any) -> bool:
        """Whether what was read is still there: a run that was resumed cuts off what a crash undid, and goes on."""
        file.seek(max(0, self._read - _CHECKED))
        return bool(file.read(min(self._read, _CHECKED)) == self._before)

    def _take_all(self, file: Any) -> bool:
        """Read the lines that are whole; a half last line is read when its end is there."""
        file.seek(self._read)
        rest, has_news = b"", False
        while (chunk := file.read(_CHUNK)) and len(rest) < _CHUNK:  # beyond it, nothing of ours follows
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line)
                self._read += len(line) + 1
            has_news = has_news or bool(lines)
        if has_news:
            file.seek(max(0, self._read - _CHECKED))
            self._before = file.read(min(self._read, _CHECKED))
        return has_news

    def _take(self, line: bytes) -> None:
        self._num_lines += 1
        row = _row(line)
        if row is None:
            self._num_broken += 1
            self._first_broken = self._first_broken or self._num_lines
        elif "loss" in row:
            self._add_step(row)
        else:
            self._measured.append(row)
            if len(self._measured) > 2 * MOST_ROWS:
                lowest = min(self._measured, key=_held_out)
                self._measured = [row for i, row in enumerate(self._measured) if i % 2 == 0 or row is lowest]

    def _add_step(self, row: Row) -> None:
        self._last = row
        if row.get("seconds") is not None:
            self._recent.append((row["seconds"], row.get("loader_seconds") or 0.0))
        self._group.append(row)
        if len(self._group) == self._every:
            self._steps.append(_merged(self._group))
            self._group = []
        if len(self._steps) > 2 * MOST_ROWS - 2:
            self._steps = [_merged(self._steps[i : i + 2]) for i in range(0, len(self._steps), 2)]
            self._every *= 2

    def _now(self) -> Lines:
        steps = [*self._steps, *([_merged(self._group)] if self._group else [])]
        seconds = median(s for s, _ in self._recent) if self._recent else None
        total = sum(s for s, _ in self._recent)
        return Lines(
            tuple(sorted([*steps, *self._measured], key=lambda row: row["step"])),
            self._every,
            self._last,
            seconds,
            min(1.0, sum(w for _, w in self._recent) / total) if total else None,
            self._num_broken,
            self._first_broken,
        )


_followers: OrderedDict[Path, Follower] = OrderedDict()
_followers_lock = Lock()


def follow(path: Path) -> Lines:
    """What a ``metrics.jsonl`` says now. What was read of it before is kept, for the last few files.

    Raises:
        OSError: it cannot be read.
    """
    with _followers_lock:
        follower = _followers.pop(path, None) or Follower(path)
        _followers[path] = follower
        while len(_followers) > _MOST_FOLLOWED:
            _followers.popitem(last=False)
    return follower.lines()


def last_lines(path: Path, num_bytes: int = 16 << 10) -> list[Row]:
    """The last few lines that are whole, for a list of many runs; nothing of a file that cannot be read."""
    try:
        with open_plain(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            raw = file.read(num_bytes)
    except OSError:
        return []
    lines = raw.split(b"\n")[:-1]
    return [row for line in (lines[1:] if size > num_bytes else lines) if (row := _row(line)) is not None]


def _row(line: bytes) -> Row | None:
    """The values of a line that can be drawn or counted; None for what is no line of ours."""
    try:
        row = json.loads(line)
        step = row["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MOST_STEP:
        return None
    return {"step": step} | {name: _value(name, value) for name, value in row.items() if name not in ("step", "rows")}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_number(part) for part in value[:_MOST_PARTS]]
    if isinstance(value, str):
        return value if name.endswith("_key") else None
    return _number(value)


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, also for true and false."""
    kind = type(value)
    return value if (kind is float or kind is int) and -_MOST_VALUE <= value <= _MOST_VALUE else None


def _held_out(row: Row) -> float:
    loss = row.get("held_out_loss")
    return math.inf if loss is None else loss


def _merged(rows: Sequence[Row]) -> Row:
    """Rows as one: of each value the mean, under the last step."""
    if len(rows) == 1:
        return rows[0]
    merged: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if name in ("step", "steps"):
            merged[name] = values[-1]
        elif name in _LARGEST:
            merged[name] = max((v for v in values if isinstance(v, int | float)), default=None)
        elif any(isinstance(value, list) for value in values):
            merged[name] = _merged_lists([value for value in values if isinstance(value, list)])
        else:
            merged[name] = _mean(values)
    return merged


def _merged_lists(lists: Sequence[list[float | None]]) -> list[float | None]:
    length = max(map(len, lists))
    return [_mean([parts[i] for parts in lists if i < len(parts)]) for i in range(length)]


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else None
