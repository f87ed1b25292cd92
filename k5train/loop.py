"""The training loop: batches in, updates to the adapter, checkpoints and pictures out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from k5cache import console
from k5cache.errors import CacheStale, RunError
from k5cache.hub import read_config, weight_files
from k5train import flow, lora, sample
from k5train.base.forward import predict_velocity
from k5train.base.quantize import load_transformer
from k5train.checkpoint import Run, write_whole
from k5train.config import TrainConfig
from k5train.data import Batch, Group, Loader, prefetch
from k5train.metrics import Metrics
from k5train.optim import learning_rate, make_optimizer

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5cache.store.reader import Cache

LARGE = 4 * 2**30  # bytes of bf16 weights from which a CPU is no place to train
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
        RunError: there is no GPU for a full-size model, or the loss is not finite.
    """
    device = pick_device(config.device, folder)
    check_fit(cache, folder)
    painter = Painter(cache, folder, config, run) if config.validation.prompts else None
    console.note(f"Loading the transformer ({config.base_model_precision}) on {device}")
    transformer = load_transformer(folder, config.base_model_precision, DTYPES[config.mixed_precision], device)
    matched = lora.add_lora(transformer, config.lora, config.seed)
    console.note(lora.describe(matched))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.optim)
    loader = Loader(cache, config, read_config(folder, "vae")["scaling_factor"])
    predict = partial(predict_velocity, transformer, gradient_checkpointing=config.memory.gradient_checkpointing)
    save = partial(lora.save_lora, transformer=transformer, metadata=_metadata(cache, config, run))
    started, losses = time.monotonic(), list[float]()

    with console.progress() as bars, Metrics(run.metrics) as metrics:
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


def train_step(predict: Predict, group: Group) -> Tensor:
    """The flow-matching loss of one forward pass, a mean over its rows and elements, in float32."""
    noisy = flow.add_noise(group.latents, group.noise, group.sigma)
    velocity = predict(noisy, group.sigma, group.prompt_embeds, group.pooled_projections)
    return flow.flow_loss(velocity, flow.velocity_target(group.latents, group.noise))


def accumulate(predict: Predict, batches: Sequence[Batch], cache: Cache, device: torch.device) -> float:
    """Gradients of one update: every row weighs the same, however rows fall into batches and groups.

    Returns:
        The mean loss over the rows.

    Raises:
        RunError: the loss is not finite; the rows are named and nothing was updated.
    """
    num_rows = sum(batch.num_rows for batch in batches)
    total = 0.0
    for batch in batches:
        for group in batch.groups:
            loss = train_step(predict, group.to(device))
            share = group.latents.shape[0] / num_rows
            torch.autograd.backward(loss * share)
            total += loss.item() * share
        if not math.isfinite(total):
            names = ", ".join(cache.row(i).path for i in batch.rows)
            raise RunError(
                f"The loss is {total} at {names}", "Check these rows with `k5cache verify`, or lower train.optim.lr"
            )
    return total


def update(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], max_grad_norm: float) -> float:
    """Clip, step, clear. Returns the gradients' norm before clipping."""
    limit = max_grad_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


class Painter:
    """Draws the validation prompts at a step and keeps the run's grid up to date.

    Raises:
        CacheError: a prompt is not in the cache: found before anything is loaded.
    """

    def __init__(self, cache: Cache, folder: Path, config: TrainConfig, run: Run) -> None:
        chosen = config.validation
        self.folder, self.run, self.prompts = folder, run, chosen.prompts
        self.rows, self.negative = sample.prompt_rows(cache, chosen.prompts, chosen.negative_prompt)
        self.settings = sample.settings_for(cache, chosen)
        self.drawn: list[tuple[str, list[Image.Image]]] = []

    def draw(self, transformer: Kandinsky5Transformer3DModel, step: int, bars: Progress) -> None:
        """Sample every prompt with the transformer as it is now, decode, and write pictures and grid."""
        transformer.eval()
        pictures = sample.draw_prompts(
            transformer, self.folder, self.rows, self.negative, self.settings, bars, f"sampling at step {step}"
        )
        target = self.run.samples(step)
        target.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            write_whole(target / f"{i:02d}.png", partial(picture.save, format="PNG"))
        self.drawn.append((f"step {step}" if step else "before", pictures))
        grid = sample.grid(self.drawn, self.prompts)
        write_whole(self.run.grid, partial(grid.save, format="PNG"))


def pick_device(name: str, folder: Path) -> torch.device:
    """The device to train on.

    Raises:
        RunError: a GPU is asked for and there is none, or a full-size model would land on the CPU unasked.
    """
    if torch.cuda.is_available() and name != "cpu":
        return torch.device("cuda")
    if name == "cuda":
        raise RunError(
            f"train.device is cuda and torch {torch.__version__} sees no GPU", "Install torch for CUDA, or use cpu"
        )
    num_bytes = sum(f.stat().st_size for f in weight_files(folder, "transformer"))
    if name == "auto" and num_bytes > LARGE:
        raise RunError(
            f"There is no GPU that torch {torch.__version__} sees, and the transformer has "
            f"{console.human_bytes(num_bytes)} of weights: one step on a CPU would take minutes",
            "Run on a machine with a GPU and torch for CUDA; --set train.device=cpu trains on the CPU all the same",
        )
    return torch.device("cpu")


def check_fit(cache: Cache, folder: Path) -> None:
    """Refuse a cache whose tensors this transformer cannot take, before anything is loaded.

    Raises:
        CacheStale: widths differ: the cache was made by another family of encoders.
    """
    wanted = read_config(folder, "transformer")
    text = cache.prompt("")
    found = {"in_text_dim": text.prompt_embeds.shape[-1], "in_text_dim2": text.pooled.shape[-1]}
    for name, width in found.items():
        if width != wanted[name]:
            raise CacheStale(
                f"{cache.root} holds text embeddings {width} wide, the transformer in {folder} takes {wanted[name]}",
                "Encode with the same model: k5cache encode SOURCE -o OTHER --model DIR",
            )


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
