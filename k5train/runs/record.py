"""What do a run's own files say of it: its settings, its curves, how far it came? No model, no cache and no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from k5cache.shared.disk_errors import sentence
from k5cache.shared.errors import K5Error, OutputError
from k5cache.shared.plain import read_plain
from k5cache.shared.recipe import to_dict
from k5cache.shared.sealed import unseal_if_sealed
from k5train.runs.folder import Run, open_run
from k5train.runs.metrics import read_metrics

MEASURED = ("held_out", "ema_held_out", "held_out_prior", "probe")
"""What is measured on the same triples at every measurement: metrics.jsonl has ``<name>_loss``."""
UNSEALED_RESULT = (
    "lora", "loads_by", "grid", "steps", "first_loss", "last_loss", "seconds", "ended_by", "best_step", "best_loss",
    "seconds_to_start", "pipeline",
)  # fmt: skip
"""All that earlier versions wrote into result.json, without a checksum."""
_MOST_STEPS = 10**12
UNRECORDED = "not recorded: "
"""With this begins the key of held-out losses that an earlier version measured."""

Point = tuple[int, float | None]
"""A step and a loss; None if the loss was not finite."""


@dataclass(frozen=True)
class Loss:
    """A measured loss, and where the weights are that have it."""

    step: int
    loss: float | None
    """None: it was not finite."""
    file: Path | None = None
    """The LoRA. None: no file was kept, or it is the base model."""


@dataclass(frozen=True)
class Record:
    """One run as its files tell it. What cannot be read is empty, and ``problems`` says why."""

    root: Path
    name: str
    problems: tuple[str, ...] = ()
    is_ours: bool = True
    """False if a link in it leads out of it, or it holds a pipe: then nothing in it is read."""
    lora: Path | None = None
    """Where the finished LoRA is, or will be. None if nothing is read."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value of every option, with defaults, and ``cache``."""
    is_finished: bool = False
    ended_by: str | None = None
    """``steps``, ``max_hours`` or ``patience``; None if the run is not finished."""
    steps: int = 0
    """Updates done."""
    curves: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    """The measurements by step, for each name in ``MEASURED`` that the run has."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """What each curve was measured on: losses can be compared if these are equal."""
    base: Loss | None = None
    """The held-out loss before the first step."""
    final: Loss | None = None
    """The held-out loss last measured, after the first step."""
    best: Loss | None = None
    """The lowest held-out loss. At step 0 it is that of the base."""
    ema: Loss | None = None
    """The held-out loss last measured of the average."""
    seconds: float | None = None
    """Training time in all, known of a finished run."""
    seconds_per_step: float | None = None
    """Median."""
    peak_gib: float | None = None
    """The most VRAM that torch reserved."""

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        curve = self.curves.get(name)
        return curve[-1][1] if curve else None

    def first(self, name: str) -> float | None:
        """The value of a curve before the first step."""
        curve = self.curves.get(name)
        return curve[0][1] if curve and curve[0][0] == 0 else None

    @property
    def ended_worse_than_base(self) -> bool:
        """Whether the last held-out loss is above the first in the digits that are shown, or not finite."""
        if self.base is None or self.final is None or self.base.loss is None:
            return False
        return self.final.loss is None or round(self.final.loss, 4) > round(self.base.loss, 4)


def read_record(root: Path, rows: Sequence[dict[str, Any]] | None = None) -> Record:
    """Read a run. Damage to one of its files costs only what that file says.

    Args:
        rows: of its metrics.jsonl, if somebody has read them already.
    """
    run = Run(root)
    record = Record(root, run.name)
    try:
        record = replace(record, settings=_settings(root))
    except OutputError as error:
        return replace(record, problems=(error.problem,), is_ours=False)
    except (K5Error, OSError) as error:
        record = replace(record, problems=(_problem(error),))
    record, result = _with_result(record, run)
    record = replace(record, lora=run.lora, seconds=_number(result.get("seconds")))
    try:
        if rows is None:
            rows = read_metrics(run.metrics) if run.metrics.exists() or run.is_finished else []
    except (K5Error, OSError) as error:
        return replace(record, problems=(*record.problems, _problem(error)))
    return _with_metrics(record, run, [row for row in rows if row["step"] < _MOST_STEPS])


def _settings(root: Path) -> dict[str, Any]:
    _, model, config, cache = open_run(root)
    settings = flat({"model": to_dict(model), "train": to_dict(config)})
    settings.pop("train.name", None)  # its folder's
    return settings if config.data else {"cache": str(cache), **settings}


def flat(document: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted name -> value of everything in nested tables that is no table."""
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return values


def _problem(error: K5Error | OSError) -> str:
    if isinstance(error, K5Error):
        return error.problem
    answer = sentence(error)
    return answer[0] if answer else str(error)


def _with_result(record: Record, run: Run) -> tuple[Record, dict[str, Any]]:
    if not run.is_finished:
        return record, {}
    try:
        result = unseal_if_sealed(read_plain(run.result), UNSEALED_RESULT)
    except (OSError, ValueError):
        problem = f"{run.result} is not the file that was written"
        return replace(record, problems=(*record.problems, problem), is_finished=True), {}
    ended_by = result.get("ended_by")
    return replace(record, is_finished=True, ended_by=ended_by if isinstance(ended_by, str) else None), result


def _with_metrics(record: Record, run: Run, rows: Sequence[dict[str, Any]]) -> Record:
    curves = {name: curve for name in MEASURED if (curve := _curve(rows, f"{name}_loss"))}
    steps = max((row["step"] for row in rows), default=0)
    keys = {name: key for name in MEASURED for row in rows if isinstance(key := row.get(f"{name}_key"), str)}
    if "held_out" in curves:
        keys.setdefault("held_out", _unrecorded_key(record.settings))
    held_out = curves.get("held_out", ())
    later = [point for point in held_out if point[0]]
    ema = curves.get("ema_held_out", ())
    return replace(
        record,
        steps=steps,
        curves=curves,
        keys=keys,
        base=Loss(*held_out[0]) if held_out and held_out[0][0] == 0 else None,
        final=_loss(run, record, later[-1], steps) if later else None,
        best=_best(run, record, held_out, steps),
        ema=Loss(*ema[-1], _there(run.ema) if ema[-1][0] == steps else None) if ema else None,
        seconds_per_step=_median(_number(row.get("seconds")) for row in rows if "loss" in row),
        peak_gib=max(_numbers(row.get("peak_reserved_gib") for row in rows), default=None),
    )


def _best(run: Run, record: Record, curve: Sequence[Point], steps: int) -> Loss | None:
    measured = [(loss, step) for step, loss in curve if loss is not None]
    if not measured:
        return None
    loss, step = min(measured)
    found = _loss(run, record, (step, loss), steps)
    return found if found.file or not step else replace(found, file=_there(run.best))


def _loss(run: Run, record: Record, point: Point, steps: int) -> Loss:
    """A measurement with its file: the finished LoRA if it is of the last step, or a checkpoint."""
    step, loss = point
    paths = [run.lora] if record.is_finished and step == steps else []
    there = [path for path in (*paths, run.checkpoint(step)) if step and path.is_file()]
    return Loss(step, loss, there[0] if there else None)


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _curve(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[Point, ...]:
    """The points of one field. Of two measurements at one step, the later counts."""
    return tuple(sorted({row["step"]: _number(row[name]) for row in rows if name in row}.items()))


def _unrecorded_key(settings: Mapping[str, Any]) -> str:
    """What stands for the key of the held-out rows, which earlier versions did not write: what decided about them."""
    names = ("cache", "train.data", "train.validation.split", "train.validation.held_out_sigmas")
    return UNRECORDED + ", ".join(str(settings.get(name)) for name in names)


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, as a damaged line may have it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> list[float]:
    return [number for value in values if (number := _number(value)) is not None]


def _median(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else None
