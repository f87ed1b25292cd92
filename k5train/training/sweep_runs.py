"""Which runs does a sweep have? All combinations of a grid, or the tables of a list."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.origins import Document, line_of
from k5cache.shared.packaged import advice, located
from k5cache.shared.recipe import parse, read_toml, set_option, to_dict
from k5train.options.train import FIXED, TrainConfig
from k5train.options.without_effect import options_without_effect
from k5train.runs.compared import some
from k5train.runs.differences import differences
from k5train.training.start import resolved


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    label: str
    """Also the name of its folder."""
    config: TrainConfig


def sweep_runs(
    document: Document, grid: Sequence[str], listed: Path | None, others: Mapping[str, type[Any]] | None = None
) -> tuple[ModelConfig, list[SweepRun]]:
    """Every run of a sweep, each a recipe with other options.

    Args:
        document: the recipe that all runs start from.
        grid: lines such as ``train.lora.rank=8,16``, one for each option.
        listed: a TOML file of ``[[run]]`` tables, each written like a recipe.
        others: tables of the recipe that a sweep does not use, to be checked all the same.

    Raises:
        RecipeError: there is neither a grid nor a list or there are both, an option is misspelt, two runs are the
            same, or the runs cannot share a base.
    """
    if bool(grid) == bool(listed):
        raise RecipeError(
            "A sweep needs a grid or a list" if not grid else "A sweep has a grid or a list, not both",
            "Give --grid train.lora.rank=8,16 (and more --grid), or --list FILE with [[run]] tables",
        )
    variants = _from_grid(document, grid) if grid else _from_list(document, listed)
    runs: list[SweepRun] = []
    for label, variant in variants:
        model, config, *_ = parse(variant, {"model": ModelConfig, "train": TrainConfig, **(others or {})})
        runs.append(SweepRun(label, resolved(config)))
    first = runs[0]
    for run in runs[1:]:
        different = differences(to_dict(first.config), to_dict(run.config))
        fixed = [line for line in different if line.split(":")[0].split(".")[0] in FIXED]
        if fixed:
            raise RecipeError(
                f"{run.label} would need another base than {first.label}: {'; '.join(fixed)}",
                f"Sweep over other options; {', '.join(FIXED)} must be the same for all runs",
            )
    for a, b in itertools.combinations(runs, 2):
        if a.label == b.label or a.config == b.config:
            raise RecipeError(f"{a.label} and {b.label} are the same run", "Leave one of them out")
    for axis in grid:
        _check_has_effect(axis, runs)
    return model, runs


def _check_has_effect(axis: str, runs: Sequence[SweepRun]) -> None:
    """Refuse a line of the grid whose option does nothing in all runs: each LoRA would be trained several times.

    Where it does something in some of them, ``warnings_of`` names the others.
    """
    name = axis.partition("=")[0].strip()
    value_in = attrgetter(name.removeprefix("train."))
    changed = [run for run in runs if value_in(run.config) != value_in(TrainConfig())]
    said = [[line for line in options_without_effect(run.config) if line.startswith(f"{name} does nothing")]
            for run in changed]  # fmt: skip
    if said and all(said):
        raise RecipeError(
            f"--grid {axis} trains the same LoRA again: {said[0][0]}", "Leave it out, or --set the option it belongs to"
        )


def warnings_of(runs: Sequence[SweepRun], lines_of: Callable[[SweepRun], Sequence[str]]) -> list[str]:
    """What `k5train run` would say before each run, once each: of all runs, or with the names of some."""
    labels: dict[str, list[str]] = {}
    for run in runs:
        for line in lines_of(run):
            labels.setdefault(line, []).append(run.label)
    return [line if len(of) == len(runs) else f"{some(of)}: {line}" for line, of in labels.items()]


def _from_grid(document: Document, grid: Sequence[str]) -> list[tuple[str, Document]]:
    axes = []
    for line in grid:
        name, equals, values = line.partition("=")
        if not equals or not values:
            raise RecipeError(f"--grid {line} is not option=value,value", "Write it like --grid train.lora.rank=8,16")
        if name.strip().partition(".")[0] in ("model", "cache"):
            raise RecipeError(
                f"--grid {line}: all runs of a sweep train on the same cache and model",
                "Sweep over options of [train]: --grid train.lora.rank=8,16",
            )
        axes.append([f"{name.strip()}={value.strip()}" for value in _split(values)])
    variants = []
    for combination in itertools.product(*axes):
        variant = deepcopy(document)
        for option in combination:
            set_option(variant, option, "--grid")
        variants.append((_folder_name(",".join(_short(option) for option in combination)), variant))
    return variants


def _from_list(document: Document, listed: Path | None) -> list[tuple[str, Document]]:
    assert listed is not None
    fix = 'Write [[run]] tables, each with name = "..." and options as in a recipe: train.lora.rank = 8'
    listed, said = located(listed)
    if said:
        console.note(said)
    if not os.path.exists(listed):  # noqa: PTH110 (False for a name that the system does not allow)
        raise RecipeError(f"There is no list {listed}", advice(listed, "--list"))
    contents, _, text = read_toml(listed, fix)
    tables = contents.get("run")
    if set(contents) != {"run"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise RecipeError(f"{listed} has something other than [[run]] tables", fix)
    variants = []
    for number, table in enumerate(tables, 1):
        variant = deepcopy(document)
        label = str(table.pop("name", f"run-{number}"))
        line = line_of(text, ("run", number - 1))
        for name, value in _leaves(table):
            variant.give(name, value, f"{listed}, [[run]] {number} on line {line}")
        variants.append((_folder_name(label), variant))
    return variants


def _leaves(table: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a table that is no table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _split(values: str) -> list[str]:
    """Split at commas outside brackets and quotes: ``[0.9,0.99],[0.9,0.95]`` are two values."""
    return [match.group() for match in re.finditer(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""", values)]


def _short(option: str) -> str:
    """``train.lora.rank=8`` -> ``rank=8``."""
    name, _, value = option.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w=,.+-]+", "_", label).strip("._") or "run"
