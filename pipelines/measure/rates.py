"""At which learning rate does each adapter and each optimizer learn as a LoRA does with AdamW?

The demo's style is learnt by k5-micro at several rates, and each LoRA is judged on drawings that nothing was trained
on: in that style, and in the styles that the base knows. The usual rates in ``k5train/options/rate.py`` come from this.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer

from k5cache.shared import console
from k5cache.shared.files import make_folder
from k5cache.shared.outputs import check_file
from k5cache.shared.recipe import to_dict
from k5train.training.optimizer import EXTRAS
from pipelines.measure import command_line, judged, pool

DEMO = Path("pipelines/demo")
JUDGED_ON = ("held_out", "known")
"""Drawings in the style of the LoRA, and in the base's own styles."""
Kind = tuple[tuple[str, ...], tuple[float, ...]]
KINDS: dict[str, Kind] = {
    "LoRA, rank 32": ((), (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)),
    "LoRA, rank 8": (("lora.rank=8",), (2e-4, 5e-4, 1e-3)),
    "DoRA, rank 32": (("lora.algo=dora",), (2e-4, 5e-4, 1e-3)),
    "rsLoRA, rank 8": (("lora.algo=rslora", "lora.rank=8"), (7e-5, 1.8e-4, 3.5e-4)),
    "rsLoRA, rank 32": (("lora.algo=rslora",), (3.5e-5, 9e-5, 1.8e-4, 5e-4)),
    "LoKr": (("lora.algo=lokr",), (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)),
    "LoKr, decompose_factor 4": (("lora.algo=lokr", "lora.decompose_factor=4"), (5e-4, 2e-3, 5e-3, 1e-2)),
    "Lion": (("optim.optimizer=lion",), (3e-5, 7e-5, 1.7e-4, 3.5e-4, 7e-4)),
    "Muon": (("optim.optimizer=muon",), (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)),
    "Adafactor": (("optim.optimizer=adafactor",), (2e-4, 5e-4, 1e-3)),
    "schedule-free AdamW": (("optim.optimizer=schedulefree", "optim.lr_scheduler=constant"), (2e-4, 5e-4, 1e-3)),
    "Prodigy": (("optim.optimizer=prodigy",), (0.3, 1.0)),
}
"""Options below ``train``, and rates. All but the named options are the demo's, whose own rate is 5e-4."""


def main(
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the losses here, as JSON.")] = Path(
        "build/rates/rates.json"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="LoRAs at each rate.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = os.cpu_count() or 1,
    steps: Annotated[int | None, typer.Option(help="Steps of a run. Default: the demo's.")] = None,
    folder: Annotated[Path, typer.Option(help="Where caches and runs are kept.")] = Path("build/rates"),
) -> None:
    """Train LoRAs of every kind at several rates on a CPU, and judge them. Goes on where it was stopped."""
    torch.set_num_threads(1)
    setting = {"train": to_dict(read_recipe(steps).train)}
    pool.read_results(check_file(out, ".json"), setting)  # refuses another file before any work
    make_folder(out.parent)
    place = folder / hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]
    for name in ("images", *JUDGED_ON):
        judged.encode(DEMO / name, place / name, read_recipe(steps))
    kinds = {name: kind for name, kind in KINDS.items() if not missing_extra(kind[0])}
    for name in KINDS.keys() - kinds.keys():
        console.warn(f"{name} is left out: {missing_extra(KINDS[name][0])} is not installed")
    jobs: dict[str, tuple[Any, ...]] = {"base": (place, steps, None, 0.0, 0)}
    for seed in range(seeds):  # so that what is cut short has all rates of the first seeds
        for name, (_, rates) in kinds.items():
            jobs |= {job_name(name, rate, seed): (place, steps, name, rate, seed) for rate in rates}
    results = pool.do_all(train_and_judge, jobs, out, setting, workers, console.note)
    print_rows(table_rows(results, kinds, seeds), seeds)
    console.out.print(out, markup=False, highlight=False)


def read_recipe(steps: int | None, *options: str) -> judged.Recipe:
    """The demo's recipe without pictures during a run, the encoders in float32."""
    quiet = [f"cache.{part}_precision=fp32" for part in ("text_encoder_1", "text_encoder_2", "vae")]
    quiet += ["train.device=cpu", "train.checkpoint_every=0", "train.validation.prompts=[]"]
    quiet += [f"train.steps={steps}"] if steps else []
    return judged.read_recipe(DEMO / "demo.toml", *quiet, *(f"train.{option}" for option in options))


def missing_extra(options: Sequence[str]) -> str | None:
    """The module that an optimizer needs and that is not installed."""
    names = [option.partition("=")[2] for option in options if option.startswith("optim.optimizer=")]
    module = EXTRAS.get(names[0]) if names else None
    return module if module and importlib.util.find_spec(module) is None else None


def job_name(kind: str, rate: float, seed: int) -> str:
    """The name of a result."""
    return f"{kind} at {rate:g}, seed {seed}"


def train_and_judge(place: Path, steps: int | None, kind: str | None, rate: float, seed: int) -> dict[str, list[float]]:
    """The losses by sigma on each of ``JUDGED_ON``: of a LoRA that is trained now, or of the base alone (None)."""
    recipe, lora = read_recipe(steps), None
    if kind:
        recipe = read_recipe(steps, *KINDS[kind][0], f"optim.lr={rate}")
        recipe = replace(recipe, train=replace(recipe.train, seed=seed))
        root = place / "runs" / f"{list(KINDS).index(kind)}-{rate:g}-{seed}"
        lora = judged.train_lora(root, place / "images", recipe)
    return {name: judged.held_out_loss(Path(recipe.model.source), lora, place / name) for name in JUDGED_ON}


def table_rows(results: Mapping[str, Any], kinds: Mapping[str, Kind], seeds: int) -> list[dict[str, Any]]:
    """For each kind and rate the losses over the base's: mean, lowest and highest of the seeds."""
    base = {name: mean(results["base"][name]) for name in JUDGED_ON}
    rows = []
    for kind, (_, rates) in kinds.items():
        for rate in rates:
            row: dict[str, Any] = {"kind": kind, "rate": rate}
            for name in JUDGED_ON:
                shares = [mean(results[job_name(kind, rate, seed)][name]) / base[name] for seed in range(seeds)]
                row[name] = {"mean": mean(shares), "lowest": min(shares), "highest": max(shares)}
            rows.append(row)
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]], seeds: int) -> None:
    """One line for each kind and rate."""
    table = console.table(f"Losses over the base's, {seeds} seeds", "kind", "lr", *JUDGED_ON)
    for row in rows:
        cells = [f"{row[n]['mean']:.3f} ({row[n]['lowest']:.3f} to {row[n]['highest']:.3f})" for n in JUDGED_ON]
        table.add_row(row["kind"], f"{row['rate']:g}", *cells)
    console.out.print(table)


if __name__ == "__main__":
    command_line.run(main)
