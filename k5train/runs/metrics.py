"""Where do a run's measurements go? To ``metrics.jsonl``, one JSON line at a time, and to every tracker."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from k5cache.shared.files import write_whole

if TYPE_CHECKING:
    from PIL import Image

    from k5train.runs.trackers import Tracker


class Metrics:
    """Appends JSON lines. Each line is passed to the operating system before the next step.

    Args:
        path: ``metrics.jsonl``.
        step: updates done before this start. Lines beyond it, which a crash undid, are removed.
        trackers: get the same numbers.
    """

    def __init__(self, path: Path, step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, trackers
        if path.exists():
            _cut(path, step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, *, step: int, **values: Any) -> None:
        """Append one line. Floats keep all their digits; NaN and infinity, which JSON does not have, become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.log(step, _numbers(clean))

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Give pictures to the trackers, by caption. On disk they have files of their own."""
        for tracker in self.trackers:
            tracker.pictures(step, pictures)

    def sync(self) -> None:
        """Wait until every line is on disk. Call it before saving a state, which relies on them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        for tracker in self.trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``. A last line that a crash cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _cut(path: Path, step: int) -> None:
    """Remove the lines beyond ``step``. A held-out loss of that step itself stays: it belongs to the saved adapter."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text != path.read_text(encoding="utf-8"):
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """What a tracker can draw: numbers, and the numbers of a list, each under its own name."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, int | float):
            flat[name] = value
        elif isinstance(value, list):
            flat |= {f"{name}/{i}": v for i, v in enumerate(value) if isinstance(v, int | float)}
    return flat
