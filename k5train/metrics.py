"""What a run measures: one JSON line a step in ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any


class Metrics:
    """Appends one JSON object a line; every line is whole on disk before the next step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one line. Floats are kept in full; NaN and infinity become null, which JSON can hold."""
        clean = {k: None if isinstance(v, float) and (v != v or v in (float("inf"), -float("inf"))) else v
                 for k, v in values.items()}  # fmt: skip
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a ``metrics.jsonl``; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
