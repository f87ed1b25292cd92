"""How did each run of a sweep end? ``sweep.json`` keeps it for every run that the sweep's folder has ever had."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.plain import read_plain
from k5cache.shared.sealed import unseal, write_sealed

FILE = "sweep.json"
"""With it a folder is a sweep's. Without a seal, an earlier version wrote it: a list with one table for each run."""
FORMAT = 1
NOT_FINISHED = "not finished"  # how the problem of a run that was stopped begins


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended, as its files say. A loss that was not measured, or is not finite, is None."""

    label: str
    """Also the name of its folder in the sweep's."""
    lora: str
    """The finished LoRA, from the sweep's folder."""
    steps: int = 0
    last_loss: float | None = None
    """The training loss: mean of the last tenth of the steps."""
    base_loss: float | None = None
    """The held-out loss before the first step."""
    final_loss: float | None = None
    """The held-out loss after the last step."""
    best_loss: float | None = None
    """The lowest held-out loss. At step 0 it is the base's."""
    best_step: int | None = None
    best_lora: str | None = None
    """The LoRA that has it, from the sweep's folder. None: it is the base, or no file of that step was kept."""
    ema_loss: float | None = None
    """The held-out loss of the average, after the last step."""
    base_probe_loss: float | None = None
    probe_loss: float | None = None
    """The same loss on images that are trained on, before the first step and after the last."""
    seconds: float | None = None
    seconds_to_start: float | None = None
    problem: str | None = None
    """Why it is not finished, or cannot be trusted."""
    remarks: tuple[str, ...] = ()
    """What a person should know of its ending, such as that it is worse than its base."""

    @property
    def error(self) -> str | None:
        """What ended it before its last step. None if it was only stopped."""
        return None if self.problem is None or self.problem.startswith(NOT_FINISHED) else self.problem


_NAMES = {field.name for field in fields(Outcome)}
_NUMBERS = {field.name for field in fields(Outcome) if "float" in str(field.type) or "int" in str(field.type)}


def write_outcomes(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Replace ``sweep.json``."""
    write_sealed(folder / FILE, {"format": FORMAT, "runs": [asdict(outcome) for outcome in outcomes]})


def read_outcomes(folder: Path) -> list[Outcome]:
    """What ``sweep.json`` says, also if an earlier version wrote it. A damaged one is named in a warning and is empty.

    The runs' own folders have all of it but the reasons of those that failed.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        raw = read_plain(path)
        rows = json.loads(raw) if raw.lstrip()[:1] == b"[" else unseal(raw)["runs"]
        return [_outcome(row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        console.warn(f"{path} is not the file that was written: how the runs ended is read from their own folders")
        return []


def _outcome(row: dict[str, Any]) -> Outcome:
    """One run. Fields of later versions are left out."""
    known = {name: value for name, value in row.items() if name in _NAMES}
    _check(known, ("label", "lora"), str)
    _check(known, _NUMBERS & known.keys() - {"steps"}, int | float | None)
    _check(known, {"problem", "best_lora"} & known.keys(), str | None)
    known["remarks"] = tuple(map(str, known.get("remarks", ())))
    known["lora"] = "/".join(Path(known["lora"]).parts[-2:])  # earlier versions wrote the whole path
    return Outcome(**known)


def _check(row: dict[str, Any], names: Collection[str], kind: Any) -> None:
    for name in names:
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} is something else")
