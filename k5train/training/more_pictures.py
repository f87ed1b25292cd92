"""More pictures from a run: the base model's above the LoRA's, on the same noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.errors import RunError
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.model import ModelConfig
from k5cache.shared.outputs import check_file, check_writable
from k5cache.store.reader import open_cache
from k5train.adapter import files
from k5train.forward.load import execute, load
from k5train.options.train import TrainConfig
from k5train.pictures import sample, sheet
from k5train.planning.plan import largest_sizes, plan_training
from k5train.runs.folder import Run
from k5train.runs.written import check_recorded
from k5train.training.device import pick_device
from k5train.training.out_of_memory import when_memory_ends


def resample(
    run: Run, model: ModelConfig, config: TrainConfig, cache: Path, step: int | None, out: Path | None
) -> Path:
    """Draw the validation prompts with the base model and with a LoRA of ``run``.

    Args:
        config: the run's. ``config.validation`` says what to draw and how.
        step: the checkpoint to draw with. None: the finished LoRA.
        out: where to write the grid. None: a new ``samples/sample-NNN.png`` in the run.

    Raises:
        DoesNotFit: VRAM ran out.
        OutputError: ``out`` is not a PNG, or cannot be written. This is found before anything is loaded.
        RunError: there is no such checkpoint, or its file has changed.
        CacheError: a prompt is not in the cache.
    """
    target = check_file(out, ".png") if out else None
    if target is None:
        check_writable(run.root / "samples")
    weights = run.lora if step is None else run.checkpoint(step)
    if not weights.is_file():
        steps = ", ".join(map(str, run.checkpoints()))
        raise RunError(
            f"There is no {weights}", f"Use --step with one of: {steps}" if steps else "Train first: k5train run"
        )
    check_recorded(weights)
    reader = open_cache(cache)
    rows, negative = sample.prompt_rows(reader, config.validation.prompts, config.validation.negative_prompt)
    settings = sample.settings_for(reader, config.validation)
    folder = model_folder(model, ("transformer", "vae", "scheduler"))
    device = pick_device(config.device, folder)
    plan = plan_training(folder, config, device, largest_sizes(reader))
    with when_memory_ends(lambda: plan, lambda: None, console.this_command), console.progress() as bars:
        transformer = load(folder, config, device, plan)
        execute(transformer, config, device, plan)
        transformer.eval()
        base_pictures = sample.draw_prompts(transformer, folder, rows, negative, settings, bars, "base model")
        files.load_lora(transformer, weights)
        lora_pictures = sample.draw_prompts(transformer, folder, rows, negative, settings, bars, run.name)
    label = run.name if step is None else f"step {step}"
    grid = sheet.grid([("base", base_pictures), (label, lora_pictures)], config.validation.prompts)
    target = target or _unused(run.root / "samples")
    make_folder(target.parent)
    write_whole(target, partial(grid.save, format="PNG"))
    return out or target


def _unused(folder: Path) -> Path:
    number = 1
    while (path := folder / f"sample-{number:03d}.png").exists():
        number += 1
    return path
