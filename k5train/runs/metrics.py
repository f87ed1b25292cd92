"""What a run measures: one JSON line a step in ``metrics.jsonl``, the same to every tracker, and a picture of it."""

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
    """Appends one JSON object a line; every line is whole on disk before the next step.

    Args:
        path: ``metrics.jsonl``.
        step: updates that the run goes on from; lines beyond it, of work that a crash undid, are dropped.
        trackers: told the same.
    """

    def __init__(self, path: Path, step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, trackers
        if path.exists():
            _cut(path, step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, *, step: int, **values: Any) -> None:
        """Append one line. Floats are kept in full; NaN and infinity become null, which JSON can hold."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.log(step, _numbers(clean))

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Show pictures by caption to the trackers; on disk they have files of their own."""
        for tracker in self.trackers:
            tracker.pictures(step, pictures)

    def sync(self) -> None:
        """Wait until every line is on disk: before a state that counts on them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        for tracker in self.trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a ``metrics.jsonl``; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _cut(path: Path, step: int) -> None:
    """Drop what lies beyond ``step``. A held-out loss of that very step stays: it belongs to the adapter there."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if text != path.read_text(encoding="utf-8"):
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """What a tracker can draw: numbers, and each of a list by its place."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, int | float):
            flat[name] = value
        elif isinstance(value, list):
            flat |= {f"{name}/{i}": v for i, v in enumerate(value) if isinstance(v, int | float)}
    return flat
