"""What do the loop, its loader, TREAD, rollout and a sweep's second run cost beside a bare step?

Real runs on random weights: one cache, one base, short runs one after another, as a sweep makes them.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from k5cache.shared import console
from k5cache.shared.model import ModelConfig
from k5train.adapter import attach
from k5train.base.architecture import FULL_SIZE
from k5train.base.quantize import Precision
from k5train.base.random_weights import random_transformer
from k5train.bench.case import TREAD_BLOCKS, Case, inputs_for
from k5train.bench.one_step import OneStep, group_of, make_session
from k5train.bench.timing import time_steps
from k5train.commands.bench import gpu_to_measure
from k5train.data.mixture import Mixture, open_mixture
from k5train.forward.load import stream_weights, streamed_blocks
from k5train.options.data import DataConfig
from k5train.options.objective import RolloutConfig, RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.precision import precision_of
from k5train.options.rate import usual_rate
from k5train.options.train import TrainConfig
from k5train.planning import vram
from k5train.planning.plan import largest_sizes, plan_for
from k5train.runs.folder import create_run
from k5train.runs.metrics import read_metrics
from k5train.training.base import Base
from k5train.training.train import train
from pipelines.measure import command_line
from pipelines.measure.random_inputs import CAPTION_LENGTHS, model_folder, write_cache

SETTLING = 3  # steps of a run that are not timed: they see their shapes for the first time
TREAD = TreadConfig(routes=(RouteConfig(0.5, *TREAD_BLOCKS),))
COLUMNS = ("run", "ms/step", "of the plain", "waited for rows", "started in", "")


@dataclass(frozen=True)
class Feature:
    """What one kind of run took."""

    name: str
    milliseconds: float
    """Median of a step, with the wait for its rows."""
    waited: float | None
    """Share of the time of all steps in which the loop waited for the loader."""
    seconds_to_start: float | None
    """From the end of the previous run until the first step could begin."""
    note: str = ""


def main(
    steps: Annotated[int, typer.Option(min=SETTLING + 1, help="Steps of each run.")] = 20,
    out: command_line.Out = None,
) -> None:
    """Time the training loop, its loader, TREAD, rollout and the second run of a sweep. Needs a GPU."""
    features = time_features(gpu_to_measure(out), num_steps=steps)
    setting = "defaults, 1024 px, random weights"
    command_line.print_table(setting, COLUMNS, table_rows(features), numbers=COLUMNS[1:5])
    command_line.write_json(out, [asdict(feature) for feature in features])


def variants(config: TrainConfig) -> dict[str, tuple[TrainConfig, str]]:
    """The runs in order: name -> settings and a note for the table."""
    warmer = replace(config, optim=replace(config.optim, lr=2 * usual_rate(config.lora, config.optim.optimizer)))
    rollout = RolloutConfig(probability=1.0, max_steps=1, min_sigma=1e-3)
    rank = max(1, config.lora.rank // 2)
    return {
        "plain": (config, ""),
        "second run, another lr": (warmer, "must start in under 3 s"),
        "TREAD 0.5, blocks 2 to -3": (replace(config, tread=TREAD), ""),
        "rollout of every row, 1 step": (replace(config, rollout=rollout), ""),
        "huber, EMA, stratified, bell": (_everything(config), ""),
        f"another rank, {rank}": (replace(config, lora=replace(config.lora, rank=rank)), "compiles again if it must"),
    }


def time_features(
    device: torch.device,
    *,
    model: Mapping[str, Any] = FULL_SIZE,
    side: int = 1024,
    precision: Precision = "int8-quanto",
    config: TrainConfig | None = None,
    num_steps: int = 20,
    report: Callable[[str], None] = console.note,
) -> list[Feature]:
    """Time a bare step, then a sweep of short runs. Report each as soon as it is known.

    Args:
        model: the transformer's config.json.
        side: of the pictures, in pixels.
        config: the settings of the runs; None: the defaults, official targets at rank 32 and batch 1.
        num_steps: steps of each run; the first ``SETTLING`` are not timed.
    """
    config = replace(
        config or TrainConfig(optim=OptimConfig(warmup_steps=0)),
        steps=num_steps, base_model_precision=precision, checkpoint_every=0, loss_limit=0.0,
    )  # fmt: skip
    features: list[Feature] = []

    def add(feature: Feature) -> None:
        features.append(feature)
        report("  ".join(cell for cell in table_rows(features)[-1] if cell))

    with TemporaryDirectory(prefix="k5-features-") as name:
        root = Path(name)
        folder = model_folder(root / "model", model)
        write_cache(root / "cache", model, side)
        data = open_mixture([DataConfig(cache=str(root / "cache"))])
        base = _base(model, config, device, data)
        add(_time_bare_step(base, config, model, side, num_steps))
        ended: float | None = None
        for label, (changed, note) in variants(config).items():
            began = time.monotonic() if ended is None else ended
            feature, ended = _time_run(label, changed, root, folder, base, began, note)
            add(feature)
    return features


def _time_run(
    label: str, config: TrainConfig, root: Path, folder: Path, base: Base, began: float, note: str
) -> tuple[Feature, float]:
    """One run, opened as a sweep opens it, and the time at which it ended."""
    data = open_mixture([DataConfig(cache=str(root / "cache"))])
    run = create_run(root / "run", root / "cache", ModelConfig(path=str(folder)), config)
    called = time.monotonic()
    result = train(data, folder, replace(config, name=run.name), run, base)
    ended = time.monotonic()
    rows = [row for row in read_metrics(run.metrics) if "loss" in row][SETTLING:]
    passes = sum(row.get("rollout_passes", 0) for row in rows)
    if passes:
        note = f"{1000 * sum(row.get('rollout_seconds', 0.0) for row in rows) / passes:.1f} ms a pass without gradient"
    feature = Feature(
        label, 1000 * median(row["seconds"] for row in rows),
        sum(row["loader_seconds"] for row in rows) / sum(row["seconds"] for row in rows),
        called - began + result.seconds_to_start, note,
    )  # fmt: skip
    shutil.rmtree(run.root)  # 2 GB of LoRA and state at full size
    return feature, ended


def _time_bare_step(base: Base, config: TrainConfig, model: Mapping[str, Any], side: int, num_steps: int) -> Feature:
    """The step of ``k5train bench`` on fixed inputs: only forward, loss, backward, clip and AdamW."""
    case = Case(precision_of(config), None, side, num_text_tokens=sum(CAPTION_LENGTHS) // len(CAPTION_LENGTHS))
    attach.add_lora(base.transformer, config.lora, seed=0)
    session = make_session(base.transformer, config, base.device, base.plan)
    execution = session.execution
    step = OneStep(session, config, group_of(inputs_for(case, dict(model), base.device)))
    timing = time_steps(step, step.warm_up, base.device, num_steps, 2)
    session.close()
    del step
    gc.collect()
    is_compiled = execution is not None and execution.is_compiled
    levels = ", ".join(f"{base.plan.levels.count(level)} {level}" for level in dict.fromkeys(base.plan.levels))
    note = f"{'compiled' if is_compiled else 'not compiled'}, {levels}; first step after {timing.first:.0f} s"
    return Feature("bare step, fixed inputs", timing.median, None, None, note)


def _base(model: Mapping[str, Any], config: TrainConfig, device: torch.device, data: Mixture) -> Base:
    sizes = largest_sizes(*(source.cache for source in data.sources))
    budget = vram.budget(device, config.memory.vram)
    plan = plan_for(model, config, device, sizes, budget)
    streamed = frozenset(streamed_blocks(plan))
    transformer = random_transformer(dict(model), precision_of(config), device, streamed)
    stream_weights(transformer, plan, device)
    return Base(transformer, device, plan)


def _everything(config: TrainConfig) -> TrainConfig:
    """Every option that needs no further pass through the transformer, all at once."""
    objective = replace(config.objective, loss_type="huber", weighting="bell", stratified_sigmas=True)
    return replace(config, objective=objective, optim=replace(config.optim, ema_decay=0.99, lr_scheduler="cosine"))


def table_rows(features: list[Feature]) -> list[list[str]]:
    """Results as rows of text."""
    plain = next((f.milliseconds for f in features if f.name == "plain"), None)
    return [
        [
            f.name, f"{f.milliseconds:.1f}", f"{f.milliseconds / plain:.2f}x" if plain else "",
            "" if f.waited is None else f"{100 * f.waited:.2f} %",
            "" if f.seconds_to_start is None else f"{f.seconds_to_start:.1f} s", f.note,
        ]
        for f in features
    ]  # fmt: skip


if __name__ == "__main__":
    command_line.run(main)
