"""Many LoRAs over one base: a grid or a list of settings, each run equal to running it alone, compared at the end."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder, read_config
from k5cache.shared.errors import DoesNotFit, RecipeError, RunError
from k5cache.shared.files import write_json, write_whole
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, set_option, to_dict
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.pictures import sheet
from k5train.planning.plan import largest_sizes, plan_for, plan_training
from k5train.planning.saved_plan import SavedPlan, read_saved_plan
from k5train.runs.folder import Run, create_run, open_run
from k5train.runs.metrics import read_metrics
from k5train.runs.resume_state import differences, latest_state
from k5train.training.base import load_base
from k5train.training.device import pick_device
from k5train.training.start import PARTS, open_data, with_library
from k5train.training.train import train

# What the shared base and its caches are made by.
FIXED = ("base_model_precision", "mixed_precision", "device", "memory", "data", "name")


@dataclass(frozen=True)
class Setting:
    """One run of a sweep."""

    label: str
    config: TrainConfig


@dataclass(frozen=True)
class Row:
    """What one run came to."""

    label: str
    lora: str
    steps: int = 0
    """Updates done."""
    last_loss: float | None = None
    best_loss: float | None = None
    seconds: float | None = None
    seconds_to_start: float | None = None
    problem: str | None = None
    """Why it ended before its last step: a loss that exploded, say. The other runs went on."""


def settings(
    document: dict[str, Any], grid: Sequence[str], listed: Path | None, recipe: Path | None
) -> tuple[ModelConfig, list[Setting]]:
    """Every run of a sweep: all combinations of a grid, or the runs of a list.

    Args:
        document: the recipe that all have in common.
        grid: ``train.lora.rank=8,16``, one line an option.
        listed: a TOML file of ``[[run]]`` tables, each written as in a recipe.

    Raises:
        RecipeError: there is neither or both, an option is misspelt, two runs are the same, or they would not share
            a base.
    """
    if bool(grid) == bool(listed):
        raise RecipeError(
            "A sweep needs a grid or a list" if not grid else "A sweep has a grid or a list, not both",
            "Give --grid train.lora.rank=8,16 (and more --grid), or --list FILE with [[run]] tables",
        )
    variants = _from_grid(document, grid) if grid else _from_list(document, listed)
    found: list[Setting] = []
    for label, changed in variants:
        model, config = parse(changed, {"model": ModelConfig, "train": TrainConfig}, recipe)
        found.append(Setting(label, with_library(config)))
    first = found[0]
    for setting in found[1:]:
        different = differences(to_dict(first.config), to_dict(setting.config))
        fixed = [line for line in different if line.split(":")[0].split(".")[0] in FIXED]
        if fixed:
            raise RecipeError(
                f"{setting.label} would need another base than {first.label}: {'; '.join(fixed)}",
                f"Sweep over other options; {', '.join(FIXED)} are the same for all",
            )
    for a, b in itertools.combinations(found, 2):
        if a.label == b.label or a.config == b.config:
            raise RecipeError(f"{a.label} and {b.label} are the same run", "Leave one of them out")
    return model, found


def sweep(cache: Path | None, out: Path, model: ModelConfig, runs: Sequence[Setting]) -> tuple[list[Row], Path | None]:
    """Train every run in ``out/<label>``; those that are finished there stay, one that was stopped goes on.

    Returns:
        one row for each run, and the picture grid: the base model, then every run, on the same noise.

    Raises:
        RunError: ``out`` holds another sweep.
    """
    folder = model_folder(model, PARTS)
    most = _largest(cache, folder, [setting.config for setting in runs])
    any_rank = len({(s.config.lora.rank, s.config.lora.ranks) for s in runs}) > 1
    base = None
    rows, before = [], None
    for number, setting in enumerate(runs, 1):
        console.note(f"Run {number} of {len(runs)}: {setting.label}", "bold")
        data = open_data(cache, setting.config)
        run = _open(out / setting.label, data, model, setting.config)
        if not run.is_finished:
            if base is None:
                device, sizes = pick_device(most.device, folder), largest_sizes(*(s.cache for s in data.sources))
                plan = plan_training(folder, most, device, sizes, _saved_plan(out, runs))
                base = load_base(folder, most, device, plan, any_rank)
            if before is not None and not run.samples(0).exists():
                _bring(before.samples(0), run.samples(0))
            try:
                train(data, folder, replace(setting.config, name=run.name), run, base)
            except (RunError, RecipeError, DoesNotFit) as error:
                console.warn(f"{setting.label}: {error.problem}")
                done = read_metrics(run.metrics) if run.metrics.is_file() else []
                steps = max((row["step"] for row in done if "loss" in row), default=0)
                rows.append(Row(setting.label, str(run.lora), steps, problem=error.problem))
                continue
            shutil.rmtree(run.state)  # three times the LoRA's size, and the run is finished
        rows.append(_row(setting.label, run))
        before = before or run
    write_json(out / "sweep.json", [asdict(row) for row in rows])
    ended_well = {row.label for row in rows if not row.problem}
    return rows, _compare(out, [setting for setting in runs if setting.label in ended_well])


def _largest(cache: Path | None, folder: Path, configs: Sequence[TrainConfig]) -> TrainConfig:
    """The run that takes most memory: one plan, by it, is for all."""
    sizes = largest_sizes(*(source.cache for source in open_data(cache, configs[0]).sources))
    device, transformer = pick_device(configs[0].device, folder), read_config(folder, "transformer")

    def demand(config: TrainConfig) -> tuple[bool, int]:
        try:
            peak = plan_for(transformer, config, device, sizes, None).peak
        except RecipeError:  # a target that matches nothing: said when it is that run's turn
            return False, 0
        return config.lora.algo in ("dora", "lokr"), peak  # theirs keep more than what is compiled

    return max(configs, key=demand)


def _from_grid(document: dict[str, Any], grid: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    axes = []
    for line in grid:
        name, equals, values = line.partition("=")
        if not equals or not values:
            raise RecipeError(f"--grid {line} is not option=value,value", "Write it like --grid train.lora.rank=8,16")
        axes.append([f"{name.strip()}={value.strip()}" for value in _split(values)])
    variants = []
    for combination in itertools.product(*axes):
        changed = deepcopy(document)
        for option in combination:
            set_option(changed, option)
        variants.append((_safe(",".join(_short(option) for option in combination)), changed))
    return variants


def _from_list(document: dict[str, Any], listed: Path | None) -> list[tuple[str, dict[str, Any]]]:
    assert listed is not None
    fix = 'Write [[run]] tables, each with name = "..." and options as in a recipe: train.lora.rank = 8'
    try:
        found = tomllib.loads(listed.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{listed} cannot be read: {error.strerror}", fix) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{listed} is not valid TOML: {error}", fix) from error
    tables = found.get("run")
    if set(found) != {"run"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise RecipeError(f"{listed} holds something other than [[run]] tables", fix)
    variants = []
    for number, table in enumerate(tables, 1):
        changed = deepcopy(document)
        label = str(table.pop("name", f"run-{number}"))
        _merge(changed, table)
        variants.append((_safe(label), changed))
    return variants


def _merge(document: dict[str, Any], table: dict[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def _split(values: str) -> list[str]:
    """At commas outside brackets and quotes: ``[0.9,0.99],[0.9,0.95]`` are two values."""
    return [match.group() for match in re.finditer(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""", values)]


def _short(option: str) -> str:
    """``train.lora.rank=8`` -> ``rank=8``."""
    name, _, value = option.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def _safe(label: str) -> str:
    return re.sub(r"[^\w=,.+-]+", "_", label).strip("._") or "run"


def _open(root: Path, data: Mixture, model: ModelConfig, config: TrainConfig) -> Run:
    if not (root / "run.json").is_file():
        return create_run(root, data.first.root, model, replace(config, name=root.name))
    run, its_model, its_config, _ = open_run(root)
    before = {"model": to_dict(its_model), "train": to_dict(its_config)}
    different = differences(before, {"model": to_dict(model), "train": to_dict(config)}, ["train.name"])
    if different:
        raise RunError(f"{root} holds a run started differently: {'; '.join(different)}", "Give another folder with -o")
    return run


def _saved_plan(out: Path, runs: Sequence[Setting]) -> SavedPlan | None:
    """The plan of a run that was stopped here and goes on only with it: then the others' too, on one base."""
    unfinished = [(run, s.config) for s in runs if not (run := Run(out / s.label)).is_finished]
    plans = (read_saved_plan(latest_state(run.state), config.deterministic) for run, config in unfinished)
    return next((plan for plan in plans if plan), None)


def _bring(source: Path, target: Path) -> None:
    """Copy the base model's pictures: they are the same for every run, and a run with other settings draws its own."""
    if source.is_dir():
        shutil.copytree(source, target)


def _row(label: str, run: Run) -> Row:
    found = json.loads(run.result.read_text(encoding="utf-8"))
    names = ("steps", "last_loss", "best_loss", "seconds", "seconds_to_start")
    return Row(label, str(run.lora), **{name: found[name] for name in names})


def _compare(out: Path, runs: Sequence[Setting]) -> Path | None:
    """One grid: the base model's row, then each run's last, where they drew the same prompts."""
    prompts = runs[0].config.validation.prompts if runs else ()
    rows: list[tuple[str, list[Image.Image]]] = []
    for setting in runs:
        folders = sorted((out / setting.label / "samples").glob("step-*"))
        shown = [("base model", folders[0])] if folders and not rows and folders[0].name == "step-000000" else []
        shown += [(setting.label, folders[-1])] if folders else []
        for label, folder in shown:
            files = [folder / f"{i:02d}.png" for i in range(len(prompts))]
            if setting.config.validation.prompts == prompts and all(f.is_file() for f in files):
                rows.append((label, [Image.open(f).convert("RGB") for f in files]))
    if not rows or not prompts:
        return None
    target = out / "samples.png"
    write_whole(target, partial(sheet.grid(rows, prompts).save, format="PNG"))
    return target
