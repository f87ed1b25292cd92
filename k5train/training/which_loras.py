"""Which LoRA files does `k5train sample` draw with, and at which strength? Each choice is one row of the grid."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.errors import RecipeError, RunError
from k5train.runs.folder import Run


@dataclass(frozen=True)
class Choice:
    """One row of the grid."""

    label: str
    path: Path
    strength: float


def choose(run: Run, which: Sequence[str], files: Sequence[Path], strengths: Sequence[float]) -> list[Choice]:
    """Every LoRA that is asked for, at every strength, in the order in which they are asked for.

    Args:
        which: ``final``, ``best``, ``ema`` or a step. If there are neither these nor ``files``: the finished LoRA.
        files: LoRA files from anywhere.
        strengths: if there are none: 1.

    Raises:
        RecipeError: a strength is not a finite number.
        RunError: the run or the disk has no such LoRA; names those of the run.
    """
    for strength in strengths:
        if not math.isfinite(strength):
            raise RecipeError(f"A strength of {strength} makes no picture", "Give a number such as --strength 0.7")
    there = _loras_of(run)
    labelled = [_of_run(run, name, there) for name in (which or ([] if files else ["final"]))]
    for file in files:
        if not os.path.isfile(file):  # noqa: PTH113 (False for a name that the system does not allow)
            problem = f"{file} is neither a LoRA nor a run" if os.path.isdir(file) else f"There is no {file}"  # noqa: PTH112
            raise RunError(problem, "Give the .safetensors file of a LoRA, or the folder of a finished run")
    labelled += zip(_labels(files), files, strict=True)
    choices: dict[tuple[Path, float], Choice] = {}
    for label, path in labelled:
        for strength in strengths or (1.0,):
            choice = Choice(_with_strength(label, strength, strengths), path, strength)
            choices.setdefault((path.resolve(), strength), choice)
    return list(choices.values())


def _loras_of(run: Run) -> dict[str, Path]:
    """What ``--which`` can name -> its file, of all that the run has."""
    steps = {str(step): path for step, path in run.checkpoints().items()}
    named = {"final": run.lora, "best": run.best, "ema": run.ema}
    return {name: path for name, path in {**named, **steps}.items() if path.is_file()}


def _of_run(run: Run, name: str, there: Mapping[str, Path]) -> tuple[str, Path]:
    """The label and the file of what a ``--which`` names."""
    key = name.lstrip("0") or "0" if name.isascii() and name.isdigit() else name.lower()
    if key in there:
        return (f"step {key}" if key.isdigit() else {"ema": "EMA"}.get(key, key)), there[key]
    problem = {
        "final": f"There is no {run.lora}: the run is not finished",
        "best": f"There is no {run.best}: the held-out loss never chose a best, or was not measured",
        "ema": f"There is no {run.ema}: the run keeps no average, or is not finished",
    }.get(key, f"{run.root} has no LoRA of step {key}" if key.isdigit() else f"--which {name} names no LoRA")
    if not there:
        go_on = console.command("k5train", "resume", run.root)
        raise RunError(f"{problem}, and the run has no other LoRA yet", f"Train it further: {go_on}")
    raise RunError(problem, f"Use --which with one of: {', '.join(there)}")


def _labels(files: Sequence[Path]) -> list[str]:
    """The files' names, with as many folders before them as it takes to tell them apart."""
    parts = [file.resolve().with_suffix("").parts for file in dict.fromkeys(files)]
    labels = {}
    for file, own in zip(dict.fromkeys(files), parts, strict=True):
        count = 1
        while count < len(own) and Counter(other[-count:] for other in parts)[own[-count:]] > 1:
            count += 1
        labels[file] = "/".join(own[-count:])
    return [labels[file] for file in files]


def _with_strength(label: str, strength: float, strengths: Sequence[float]) -> str:
    """``best``, or ``best x 0.7`` where a strength is asked for."""
    return label if strength == 1 and len(strengths) < 2 else f"{label} x {strength:g}"
