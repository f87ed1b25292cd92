"""Rows of pictures on the same noise: the base model's, and one for each LoRA and strength. The checks are done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from k5cache.shared import console
from k5cache.shared.template import PIPELINES
from k5cache.store.reader import Cache
from k5train.adapter.header import pipeline_of, read_metadata
from k5train.adapter.loaded import loaded, set_strength, vet
from k5train.base.quantize import empty_transformer
from k5train.data.split import Measured
from k5train.forward.load import execute, load
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.train import TrainConfig
from k5train.pictures import sample, sheet
from k5train.pictures.drawing import Drawing
from k5train.pictures.references import decode_references
from k5train.planning.plan import largest_sizes, plan_training
from k5train.training.device import pick_device
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.out_of_memory import when_memory_ends
from k5train.training.which_loras import Choice


def draw_rows(
    folder: Path, config: TrainConfig, cache: Cache, drawings: Sequence[Drawing], choices: Sequence[Choice],
    measured: Measured | None,
) -> tuple[Image.Image, tuple[tuple[str, float], ...]]:  # fmt: skip
    """The grid, and the label and the loss of each row. Arguments and errors are those of ``resample``.

    Args:
        folder: the checkpoint.
        measured: what each row's loss is measured on. None: no losses.
    """
    _vet(choices, folder, cache.kind)
    paths = list(dict.fromkeys(choice.path for choice in choices))
    measurement = (
        HeldOutLoss(measured.data, measured.num_sigmas, measured.scaling_factor, measured.rows) if measured else None
    )
    device = pick_device(config.device, folder)
    plan = plan_training(folder, config, device, largest_sizes(cache))
    losses: list[tuple[str, float]] = []
    with when_memory_ends(lambda: plan, lambda: None, console.this_command), console.progress() as bars:
        with console.doing(bars, "loading the transformer"):
            transformer = load(folder, config, device, plan)
        execute(transformer, config, device, plan)
        transformer.eval()
        rows: list[tuple[str, list[Image.Image]]] = []

        def add_row(label: str) -> None:
            rows.append((label, sample.draw(transformer, folder, drawings, bars, label)))
            if measurement:
                by_sigma = measurement.measure(partial(predict_velocity, transformer), device)
                losses.append((label, sum(by_sigma) / len(by_sigma)))

        add_row("base model")
        for path in paths:
            with loaded(transformer, path):
                transformer.eval()
                for choice in [choice for choice in choices if choice.path == path]:
                    set_strength(transformer, choice.strength)
                    # Anew for each: blocks remember the adapter that they ran with, and its strength.
                    execute(transformer, config, device, plan, any_rank=len(paths) > 1)
                    add_row(choice.label)
        references = decode_references(folder, drawings, device)
    grid = sheet.grid([*references.above, *rows, *references.below], [drawing.head for drawing in drawings])
    return grid, tuple(losses)


def _vet(choices: Sequence[Choice], folder: Path, kind: str) -> None:
    """Refuse LoRAs that cannot be loaded. Say which of them do something else than their row's label says."""
    empty = empty_transformer(folder)
    for path in dict.fromkeys(choice.path for choice in choices):
        if vet(path, empty) == "dora" and any(c.strength != 1 for c in choices if c.path == path):
            console.warn(
                f"{path} is a DoRA: a strength scales its matrices, as in diffusers, and not its magnitudes, so that at"
                " 0 it is not the base model"
            )
        if read_metadata(path).get("k5.step") == "0":
            console.warn(f"{path} has the adapter of before the first step: the run never found a better one")
        pipeline = pipeline_of(path)
        if pipeline not in (None, PIPELINES[kind]):
            console.warn(f"{path} was trained for {pipeline}, and this model is drawn by {PIPELINES[kind]}")
