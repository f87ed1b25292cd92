"""The training loop: batches in, updates to the adapter, checkpoints and pictures out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from k5cache import console
from k5cache.hub import read_config
from k5train import lora
from k5train.base.forward import predict_velocity
from k5train.checkpoint import Run
from k5train.config import TrainConfig
from k5train.data import Loader, prefetch
from k5train.metrics import Metrics
from k5train.optim import learning_rate, make_optimizer
from k5train.ready import announce, execute, largest, load, plan_training, when_memory_ends
from k5train.setup import check_fit, pick_device
from k5train.step import accumulate, train_step, update
from k5train.validate import Painter

if TYPE_CHECKING:
    from k5cache.store.reader import Cache


@dataclass(frozen=True)
class Result:
    """What a finished run leaves behind."""

    lora: Path
    grid: Path | None
    steps: int
    first_loss: float
    last_loss: float
    """Mean of the first and of the last tenth of the steps: single losses jump with sigma."""
    seconds: float


def train(cache: Cache, folder: Path, config: TrainConfig, run: Run) -> Result:
    """Train one LoRA on one cache.

    Args:
        folder: the checkpoint; of it only ``transformer``, and ``scheduler`` and ``vae`` for samples, are read.

    Raises:
        CacheStale: the cache does not fit the transformer.
        DoesNotFit: no plan fits, found before anything is loaded; or memory ended all the same: the LoRA is saved.
        RunError: there is no GPU for a full-size model, or the loss is not finite.
    """
    device = pick_device(config.device, folder)
    check_fit(cache, folder)
    painter = Painter(cache, folder, config, run) if config.validation.prompts else None
    plan = plan_training(folder, config, device, largest(cache))
    console.note(f"Loading the transformer ({config.base_model_precision}) on {device}")
    announce(plan)
    transformer = load(folder, config, device, plan)
    matched = lora.add_lora(transformer, config.lora, config.seed)
    console.note(lora.describe(matched))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.optim)
    loader = Loader(cache, config, read_config(folder, "vae")["scaling_factor"])
    execution = execute(transformer, config, device, plan)
    predict = partial(predict_velocity, transformer)
    save = partial(lora.save_lora, transformer=transformer, metadata=_metadata(cache, config, run))
    started, losses = time.monotonic(), list[float]()

    def step_once() -> None:
        torch.autograd.backward(train_step(predict, loader.batch(0).groups[0].to(device)))
        optimizer.zero_grad(set_to_none=True)

    def save_done() -> Path | None:
        save(at := run.checkpoint(len(losses)))
        return at

    with (
        console.progress() as bars,
        Metrics(run.metrics) as metrics,
        when_memory_ends(plan, lambda: save_done() if losses else None),
    ):
        if execution:
            execution.warm_up(step_once)
        if painter and config.validation.before:
            painter.draw(transformer, 0, bars)
        task = bars.add_task(f"training {run.name}", total=config.steps, unit="step", note="")
        micro_batches = config.steps * config.gradient_accumulation_steps
        batches = prefetch(loader.batch, 0, micro_batches, pin=device.type == "cuda")
        for step in range(config.steps):
            tick = time.monotonic()
            transformer.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.optim)
            loss = accumulate(predict, list(islice(batches, config.gradient_accumulation_steps)), cache, device)
            norm = update(optimizer, parameters, config.optim.max_grad_norm)
            losses.append(loss)
            metrics.write(step=step + 1, loss=loss, grad_norm=norm, lr=optimizer.param_groups[0]["lr"],
                          seconds=time.monotonic() - tick, **_memory(device))  # fmt: skip
            bars.update(task, advance=1, note=f"loss {_tail_mean(losses):.4f}")
            done = step + 1
            if done < config.steps and config.checkpoint_every and done % config.checkpoint_every == 0:
                save(run.checkpoint(done))
            if done < config.steps and painter and config.validation.every and done % config.validation.every == 0:
                painter.draw(transformer, done, bars)
        batches.close()
        save(run.checkpoint(config.steps))
        save(run.lora)
        if painter:
            painter.draw(transformer, config.steps, bars)
    tenth = max(1, len(losses) // 10)
    return Result(run.lora, run.grid if painter else None, config.steps, sum(losses[:tenth]) / tenth,
                  sum(losses[-tenth:]) / tenth, time.monotonic() - started)  # fmt: skip


def _metadata(cache: Cache, config: TrainConfig, run: Run) -> dict[str, str]:
    return {
        "software": "kandinsky5-lora",
        "name": run.name,
        "base_model": str(cache.manifest.recipe["model"]["source"]),
        "steps": str(config.steps),
        "seed": str(config.seed),
    }


def _memory(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {"peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30}


def _tail_mean(losses: list[float], count: int = 20) -> float:
    return sum(losses[-count:]) / len(losses[-count:])
