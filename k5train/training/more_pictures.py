"""More pictures from a finished run: the base model's above the LoRA's, on the same noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.errors import RunError
from k5cache.shared.files import write_whole
from k5cache.shared.model import ModelConfig
from k5cache.store.reader import open_cache
from k5train.adapter import files
from k5train.forward.load import execute, load
from k5train.options.train import TrainConfig
from k5train.pictures import sample, sheet
from k5train.planning.plan import largest_sizes, plan_training
from k5train.runs.folder import Run
from k5train.training.device import pick_device
from k5train.training.out_of_memory import when_memory_ends


def resample(
    run: Run, model: ModelConfig, config: TrainConfig, cache: Path, step: int | None, out: Path | None
) -> Path:
    """Draw the validation prompts with the base model and with a LoRA of ``run``.

    Args:
        config: the run's; ``config.validation`` says what to draw and how.
        step: which checkpoint; None: the finished LoRA.
        out: where the grid goes; None: ``samples/sample-NNN.png`` in the run, never written over.

    Raises:
        DoesNotFit: VRAM ended.
        RunError: that checkpoint does not exist.
        CacheError: a prompt is not in the cache.
    """
    weights = run.lora if step is None else run.checkpoint(step)
    if not weights.is_file():
        have = ", ".join(
            str(int(p.stem.removeprefix("step-"))) for p in sorted((run.root / "checkpoints").glob("*.safetensors"))
        )
        raise RunError(
            f"There is no {weights}", f"Use --step with one of: {have}" if have else "Train first: k5train run"
        )
    opened = open_cache(cache)
    rows, negative = sample.prompt_rows(opened, config.validation.prompts, config.validation.negative_prompt)
    settings = sample.settings_for(opened, config.validation)
    folder = model_folder(model, ("transformer", "vae", "scheduler"))
    device = pick_device(config.device, folder)
    plan = plan_training(folder, config, device, largest_sizes(opened))
    again = partial(console.command, "k5train", "sample", run.root)
    with when_memory_ends(lambda: plan, lambda: None, again), console.progress() as bars:
        transformer = load(folder, config, device, plan)
        execute(transformer, config, device, plan)
        transformer.eval()
        before = sample.draw_prompts(transformer, folder, rows, negative, settings, bars, "base model")
        files.load_lora(transformer, weights)
        after = sample.draw_prompts(transformer, folder, rows, negative, settings, bars, run.name)
    label = run.name if step is None else f"step {step}"
    grid = sheet.grid([("base", before), (label, after)], config.validation.prompts)
    target = out or _free(run.root / "samples")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, partial(grid.save, format="PNG"))
    return target


def _free(folder: Path) -> Path:
    number = 1
    while (path := folder / f"sample-{number:03d}.png").exists():
        number += 1
    return path
