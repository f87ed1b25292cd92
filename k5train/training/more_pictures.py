"""More pictures from a run: the base model's above those of one or several LoRAs, on the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder, read_config
from k5cache.shared.drawn import check_picture, write_picture
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.outputs import check_writable
from k5cache.store.reader import Cache, open_cache
from k5train.adapter.header import check_kind
from k5train.data.kind import check_options
from k5train.data.mixture import Mixture, Source, open_mixture
from k5train.data.split import Measured, held_out_rows, probe_rows, split_off
from k5train.options.data import DataConfig
from k5train.options.extremes import guidance_warnings, strength_warnings
from k5train.options.train import TrainConfig
from k5train.pictures.drawing import Drawing
from k5train.pictures.drawings import drawings_for, draws_any, note_sizes
from k5train.runs.folder import Run
from k5train.runs.written import check_recorded
from k5train.training.which_loras import Choice


@dataclass(frozen=True)
class Resampled:
    """What ``resample`` leaves."""

    grid: Path
    """The picture that was written."""
    losses: tuple[tuple[str, float], ...] = ()
    """The label and the loss of each row, in the grid's order. Empty if none was measured."""


def resample(
    run: Run, model: ModelConfig, config: TrainConfig, cache: Path, choices: Sequence[Choice], out: Path | None,
    measured: TrainConfig | None = None,
) -> Resampled:  # fmt: skip
    """Draw the validation prompts, or pairs, with the base model and with each of some LoRAs, on the same noise.

    Args:
        config: the run's. ``config.validation`` says what to draw and how.
        choices: the LoRAs, a row each. They are loaded and removed one after another.
        out: where to write the grid. None: a new ``samples/sample-NNN.png`` in the run.
        measured: the run's recipe, to measure each row's loss as the run did. None: no losses.

    Raises:
        DoesNotFit: VRAM ran out.
        OutputError: ``out`` is not a PNG, or cannot be written. This is found before anything is loaded.
        RunError: a LoRA cannot be read, is not of this model, or has changed since its run wrote it. This is found
            before the transformer is loaded.
        CacheError: a prompt or a pair is not in the cache.
        RecipeError: there is nothing to draw, or what is asked for belongs to the other kind of model.
    """
    target = check_out(run, out)
    paths = list(dict.fromkeys(choice.path for choice in choices))
    for path in paths:
        check_recorded(path)
    reader = open_cache(cache)
    drawings = drawings_to_draw(run, reader, config)
    note_sizes(reader, config.validation)
    for line in [*guidance_warnings(config.validation), *strength_warnings([choice.strength for choice in choices])]:
        console.warn(line)
    folder = model_folder(model, ("transformer", "vae", "scheduler"))
    for path in paths:
        check_kind(path)
    measurement = measurement_of(reader, measured, folder) if measured else None
    from k5train.training.picture_rows import draw_rows  # torch is imported here, which takes seconds

    grid, losses = draw_rows(folder, config, reader, drawings, choices, measurement)
    target = target or _unused(run.root / "samples")
    write_picture(grid, target, "k5train sample")
    return Resampled(out or target, losses)


def measurement_of(cache: Cache, config: TrainConfig, folder: Path) -> Measured:
    """What a run measured its LoRAs by: its held-out loss or, without a split, its probe loss.

    Args:
        cache: the run's first, which may have moved.
        config: the run's own recipe.

    Raises:
        RecipeError: it has neither images that are held out nor any for a probe.
        CacheError: another cache of the run is not there.
    """
    first, *others = config.data or (DataConfig(cache=""),)
    entries = [replace(first, cache=str(cache.root)), *others]
    data = split_off(open_mixture(entries), config.validation.split)
    rows = held_out_rows(data)[0] or probe_rows(data, config.validation.probe_images)
    if not rows:
        raise RecipeError(
            "There is nothing to measure on: the run holds no images out, and train.validation.probe_images is 0",
            "Leave --measure out",
        )
    scaling_factor = read_config(folder, "vae")["scaling_factor"]
    return Measured(data, rows, config.validation.held_out_sigmas, scaling_factor)


def check_out(run: Run, out: Path | None) -> Path | None:
    """Refuse a file that is not a PNG, cannot be written, or is a picture of someone else.

    Without a file, the run's samples are where it will be.

    Raises:
        OutputError: says why not.
    """
    if out is None:
        check_writable(run.root / "samples")
        return None
    return check_picture(out)


def drawings_to_draw(run: Run, cache: Cache, config: TrainConfig) -> list[Drawing]:
    """What the recipe asks to draw from the run's cache. Raises what ``resample`` says."""
    if cache.kind == "i2i" and config.validation.prompts:
        raise RecipeError(
            f"{cache.root} is for image-to-image: a prompt alone says nothing of the picture that is edited",
            "Add --source PICTURE",
        )
    check_options(Mixture([Source(cache)]), replace(config, caption_dropout_probability=0.0))
    if not draws_any(cache, config.validation):
        raise _nothing_to_draw(run, cache)
    return drawings_for(cache, config.validation, held_out_items(cache, config))


def held_out_items(cache: Cache, config: TrainConfig) -> frozenset[int]:
    """Items of the run's first cache that were held out of it: pairs are drawn from these first. The others of its
    caches decide about them too, and are opened only where that matters."""
    if cache.kind == "t2i" or config.validation.edits:
        return frozenset()
    others = [Source(open_cache(Path(entry.cache))) for entry in config.data[1:]]
    return split_off(Mixture([Source(cache), *others]), config.validation.split).sources[0].split


def _nothing_to_draw(run: Run, cache: Cache) -> RecipeError:
    """Says which prompts or pairs the cache holds, and how to add others."""
    what, source = ("pair", ["--source", "PICTURE"]) if cache.kind == "i2i" else ("prompt", [])
    add = console.command("k5cache", "prompts", "add", cache.root, *source, "PROMPT")
    draw = console.command("k5train", "sample", run.root, *source, prompt="PROMPT")
    held = [{"source": edit.source, "prompt": edit.prompt} for edit in cache.manifest.edits]
    held = held if source else [{"prompt": prompt} for prompt in cache.manifest.prompts if prompt]
    fix = f"Add one to the cache, then draw it: {add} and {draw}"
    if held:
        shortest = console.command("k5train", "sample", run.root, **min(held, key=lambda given: len(given["prompt"])))
        fix = (
            f"Draw one of the {len(held)} that the cache holds: {shortest}. Or add one, then draw it: {add} and {draw}"
        )
    return RecipeError(f"There is no {what} to draw: the recipe of {run.root} names none", fix)


def _unused(folder: Path) -> Path:
    number = 1
    while (path := folder / f"sample-{number:03d}.png").exists():
        number += 1
    return path
