"""unused"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from k5cache.shared import console
from k5cache.shared.model import ModelConfig
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5train.adapter import attach
from k5train.base import architecture, random_weights
from k5train.base.quantize import Precision
from k5train.bench import steps
from k5train.bench.case import TREAD_BLOCKS, Case, inputs_for
from k5train.bench.timing import time_steps
from k5train.data.mixture import Mixture, open_mixture
from k5train.forward.load import execute, stream_weights, streamed_blocks
from k5train.options.objective import DataConfig, RolloutConfig, RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.planning import vram
from k5train.planning.plan import largest, plan_for
from k5train.runs.folder import create_run
from k5train.runs.metrics import read_metrics
from k5train.training.base import Base
from k5train.training.loop import train

NUM_ROWS = 48


TEXT_TOKENS = tuple(range(200, 328, 16))  # of the captions, in turn; 256 on average, as in `k5train bench`


SETTLING = 3  # steps of a run that are not timed: shapes seen for the first time


TREAD = TreadConfig(routes=(RouteConfig(0.5, *TREAD_BLOCKS),))


VAE = {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611}  # Flux's


SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}


@dataclass(frozen=True)
class Feature:
    """What one kind of run took."""

    name: str
    milliseconds: float
    """Median of a step, the wait for its rows included."""
    waited: float | None
    """Share of the time of all steps in which the loop waited for the loader."""
    seconds_to_start: float | None
    """From the end of the run before, until the first step could begin."""
    note: str = ""


def variants(config: TrainConfig) -> dict[str, tuple[TrainConfig, str]]:
    """The runs, in order: what each is called, its settings, and what to say of it."""
    warmer = replace(config, optim=replace(config.optim, lr=2 * config.optim.lr))
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


def bench_features(
    device: torch.device,
    *,
    model: Mapping[str, Any] = architecture.FULL_SIZE,
    side: int = 1024,
    precision: Precision = "int8-quanto",
    config: TrainConfig | None = None,
    num_steps: int = 20,
    report: Callable[[str], None] = console.note,
) -> list[Feature]:
    """Time a bare step, then a sweep of short runs. Each line is also reported as soon as it is known.

    Args:
        model: the transformer's config.json.
        side: of the pictures, in pixels.
        config: of the runs; by default the defaults: official targets at rank 32, batch 1.
        num_steps: of each run, ``SETTLING`` of them not timed.
    """
    config = replace(
        config or TrainConfig(optim=OptimConfig(warmup_steps=0)),
        steps=num_steps, base_model_precision=precision, checkpoint_every=0, loss_limit=0.0,
    )  # fmt: skip
    found: list[Feature] = []

    def add(feature: Feature) -> None:
        found.append(feature)
        report("  ".join(cell for cell in table(found)[-1] if cell))

    with TemporaryDirectory(prefix="k5-features-") as name:
        root = Path(name)
        folder = model_folder(root / "model", model)
        write_cache(root / "cache", model, side)
        data = open_mixture([DataConfig(cache=str(root / "cache"))])
        base = _base(model, config, device, data)
        add(_bare(base, config, model, side, num_steps))
        ended: float | None = None
        for label, (changed, note) in variants(config).items():
            began = time.monotonic() if ended is None else ended
            feature, ended = _timed_run(label, changed, root, folder, base, began, note)
            add(feature)
    return found


def _timed_run(
    label: str, config: TrainConfig, root: Path, folder: Path, base: Base, began: float, note: str
) -> tuple[Feature, float]:
    """One run, opened as a sweep opens it; and when it ended."""
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


def _bare(base: Base, config: TrainConfig, model: Mapping[str, Any], side: int, num_steps: int) -> Feature:
    """The step of `k5train bench` on fixed inputs: nothing but forward, loss, backward, clip and AdamW."""
    case = Case(config.base_model_precision, None, side, num_text_tokens=sum(TEXT_TOKENS) // len(TEXT_TOKENS))
    attach.add_lora(base.transformer, config.lora, seed=0)
    execution = execute(base.transformer, config, base.device, base.plan)
    step = steps.stepper(base.transformer, inputs_for(case, dict(model), base.device))
    timing = time_steps(step, execution, base.device, num_steps, 2)
    base.transformer.unload_lora()
    del step
    gc.collect()
    is_compiled = execution is not None and execution.is_compiled
    kept = ", ".join(f"{base.plan.levels.count(level)} {level}" for level in dict.fromkeys(base.plan.levels))
    how = f"{'compiled' if is_compiled else 'not compiled'}, {kept}; first step after {timing.first:.0f} s"
    return Feature("bare step, fixed inputs", timing.median, None, None, how)


def _base(model: Mapping[str, Any], config: TrainConfig, device: torch.device, data: Mixture) -> Base:
    sizes = largest(*(source.cache for source in data.sources))
    budget = vram.budget(device, config.memory.vram)
    plan = plan_for(model, config, device, sizes, budget)
    streamed = frozenset(streamed_blocks(plan))
    transformer = random_weights.random_transformer(dict(model), config.base_model_precision, device, streamed)
    stream_weights(transformer, plan, device)
    return Base(transformer, device, plan)


def _everything(config: TrainConfig) -> TrainConfig:
    """What costs no pass through the transformer, all at once."""
    objective = replace(config.objective, loss_type="huber", weighting="bell", stratified_sigmas=True)
    return replace(config, objective=objective, optim=replace(config.optim, ema_decay=0.99, lr_scheduler="cosine"))


def write_cache(root: Path, model: Mapping[str, Any], side: int, num_rows: int = NUM_ROWS) -> None:
    """A cache of random rows as ``k5cache encode`` writes them: mean and std in float16, captions in bfloat16."""
    size = side // 8
    latents = {name: TensorSpec("float16", (size, size, model["in_visual_dim"])) for name in ("mean", "std")}
    text = {"prompt_embeds": TensorSpec("bfloat16", (None, model["in_text_dim"])),
            "pooled": TensorSpec("bfloat16", (model["in_text_dim2"],))}  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def pictures() -> Iterator[dict[str, Any]]:
        for i in range(num_rows):
            mean, std = torch.randn(2, size, size, model["in_visual_dim"], generator=generator)
            yield {"key": _key(i), "mean": mean.half(), "std": (std - 5).exp().half()}

    def captions() -> Iterator[dict[str, Any]]:
        for i in range(num_rows + 1):  # the last is the empty prompt
            n_tokens = TEXT_TOKENS[i % len(TEXT_TOKENS)] if i < num_rows else 8
            embeds = torch.randn(n_tokens, model["in_text_dim"], generator=generator).bfloat16()
            pooled = torch.randn(model["in_text_dim2"], generator=generator).bfloat16()
            caption = f"caption {i}" if i < num_rows else ""
            yield {"key": _key(i), "prompt_embeds": embeds, "pooled": pooled, "n_tokens": n_tokens, "caption": caption}

    with lock(root):
        shards = (_shard(root, "latents", latents, pictures(), (side, side)), _shard(root, "text", text, captions()))
        recipe = {"model": {"source": "random weights"}, "selection": {"resolution": side}}
        manifest = Manifest(recipe=recipe, shards=shards, prompts={"": _key(num_rows)})
        write_manifest(root, with_index(root, manifest, [_row(i, side) for i in range(num_rows)]))


def _shard(
    root: Path, kind: ShardKind, specs: dict[str, TensorSpec], rows: Iterator[dict[str, Any]],
    bucket: tuple[int, int] | None = None,
) -> ShardInfo:  # fmt: skip
    with ShardWriter(root, kind, specs, bucket) as writer:
        for row in rows:
            writer.append(row)
        return writer.finish()


def _key(number: int) -> str:
    return f"{number:032}"


def _row(i: int, side: int) -> IndexRow:
    return IndexRow(
        path=f"{i}.png", content_hash="0" * 32, num_bytes=1, mtime_ns=1, inode=i, width=side, height=side,
        bucket_width=side, bucket_height=side, resized_width=side, resized_height=side, left=0, top=0, flipped=False,
        latent_key=_key(i), caption_keys=(_key(i),),
    )  # fmt: skip


def model_folder(folder: Path, model: Mapping[str, Any]) -> Path:
    """What a run reads of a checkpoint besides the weights: three configs, and a tensor to tell it from another."""
    for part, document in (("transformer", dict(model)), ("vae", VAE)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")
    save_file({"none": torch.zeros(1)}, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


COLUMNS = ("run", "ms/step", "of the plain", "waited for rows", "started in", "")


def table(found: list[Feature]) -> list[list[str]]:
    """Results as rows of text."""
    plain = next((f.milliseconds for f in found if f.name == "plain"), None)
    return [
        [
            f.name, f"{f.milliseconds:.1f}", f"{f.milliseconds / plain:.2f}x" if plain else "",
            "" if f.waited is None else f"{100 * f.waited:.2f} %",
            "" if f.seconds_to_start is None else f"{f.seconds_to_start:.1f} s", f.note,
        ]
        for f in found
    ]  # fmt: skip
