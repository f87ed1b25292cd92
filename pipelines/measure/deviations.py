"""What does a LoRA lose that was trained on something else than inference computes? Three deviations, and all of them.

The demo's LoRA is trained again and again, with one deviation, with all, or with none, and judged as inference sees it.
The product has no switch for a deviation: each is put in from outside, while a run trains.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from k5cache.shared import console
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.outputs import check_file
from k5cache.shared.recipe import to_dict
from k5train.data.batch import Batch, Group
from k5train.data.loader import Loader
from k5train.forward import predict_velocity
from k5train.pictures import sheet
from pipelines.measure import command_line, judged, pool

DEMO = Path("pipelines/demo")
JUDGED_ON = ("held_out", "known")
"""Drawings in the style of the LoRA, and in the base's own styles. No LoRA is trained on any of them."""
SHIFT = 0.1159 * 0.3611  # shift_factor and scaling_factor of the published VAE: 0.0419
NUM_TOKENS = 32  # captions of 10 to 14 tokens become 2.7 times as long, as captions of 95 tokens do in 256
ROPE_SCALE = (1.0, 2.0, 2.0)  # of the video models, at their usual size
VARIANTS: dict[str, tuple[str, ...]] = {
    "what inference sees": (),
    "latents shifted by 0.0419": ("latents",),
    "captions padded with copies of their last token": ("captions",),
    "RoPE scale (1, 2, 2)": ("rope",),
    "all three": ("latents", "captions", "rope"),
}
NUM_PICTURES = 5  # a row: the PNG stays small enough for a page
ROWS = {"what inference sees": "trained on what inference sees", "all three": "trained with all three deviations"}
"""The variants that are drawn, below the base, and how the picture calls them."""


def main(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Write the losses here, as JSON, and the picture beside it.")
    ] = Path("build/deviations/deviations.json"),
    seeds: Annotated[int, typer.Option(min=1, help="LoRAs of each kind.")] = 6,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="Where to train and to judge.")] = "cpu",
    steps: Annotated[int | None, typer.Option(help="Steps of a run. Default: the demo's.")] = None,
    folder: Annotated[Path, typer.Option(help="Where caches and runs are kept.")] = Path("build/deviations"),
) -> None:
    """Train the demo's LoRA with three deviations from inference, and judge it. Goes on where it was stopped."""
    torch.set_num_threads(1)
    recipe = read_recipe(device, steps)
    setting = {"train": to_dict(recipe.train), "shift": SHIFT, "tokens": NUM_TOKENS, "rope_scale": ROPE_SCALE}
    pool.read_results(check_file(out, ".json"), setting)  # refuses another file before any work
    make_folder(out.parent)
    place = folder / hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]
    for name in ("images", *JUDGED_ON):
        prompts = recipe.train.validation.prompts if name == "images" else ()
        judged.encode(DEMO / name, place / name, recipe, prompts, device)
    jobs: dict[str, tuple[Any, ...]] = {"base": (place, recipe, None, 0)}
    jobs |= {job_name(v, seed): (place, recipe, v, seed) for seed in range(seeds) for v in VARIANTS}
    results = pool.do_all(train_and_judge, jobs, out, setting, workers, console.note)
    rows = table_rows(results, seeds)
    print_rows(rows, seeds, recipe.train.steps)
    document = pool.read_results(out, setting)
    write_whole(out, lambda path: command_line.write_json(path, {**document, "table": rows, **machine()}))
    draw(place, recipe, out.with_suffix(".png"))
    console.out.print(f"{out}\n{out.with_suffix('.png')}", markup=False, highlight=False)


def read_recipe(device: str, steps: int | None) -> judged.Recipe:
    """The demo's recipe without pictures during a run, the encoders in float32."""
    options = [f"cache.{part}_precision=fp32" for part in ("text_encoder_1", "text_encoder_2", "vae")]
    options += [f"train.device={device}", "train.checkpoint_every=0", "train.validation.every=0"]
    options += ["train.validation.before=false"] + ([f"train.steps={steps}"] if steps else [])
    return judged.read_recipe(DEMO / "demo.toml", *options)


def job_name(variant: str, seed: int) -> str:
    """The name of a result."""
    return f"{variant}, seed {seed}"


def train_and_judge(place: Path, recipe: judged.Recipe, variant: str | None, seed: int) -> dict[str, list[float]]:
    """The losses by sigma on each of ``JUDGED_ON``: of a LoRA that is trained now, or of the base alone (None)."""
    lora = train(place, recipe, variant, seed) if variant else None
    model, device = Path(recipe.model.source), recipe.train.device
    return {name: judged.held_out_loss(model, lora, place / name, device=device) for name in JUDGED_ON}


def train(place: Path, recipe: judged.Recipe, variant: str, seed: int) -> Path:
    """Train with the deviations of a variant, unless it is done; returns the LoRA."""
    number = list(VARIANTS).index(variant)
    validation = replace(recipe.train.validation, prompts=())  # would be drawn with the deviation
    config = replace(recipe.train, seed=seed, validation=validation)
    with deviating(VARIANTS[variant]):
        return judged.train_lora(place / "runs" / f"{number}-{seed}", place / "images", replace(recipe, train=config))


@contextmanager
def deviating(deviations: Sequence[str]) -> Iterator[None]:
    """Training in this block deviates. A transformer that was used in it keeps its RoPE tables."""
    changes = [CHANGES[name] for name in deviations if name in CHANGES]
    read = Loader.batch

    def batch(loader: Loader, micro: int) -> Batch:
        as_it_is = read(loader, micro)
        groups = as_it_is.groups
        for change in changes:
            groups = tuple(change(group) for group in groups)
        return replace(as_it_is, groups=groups)

    with ExitStack() as stack:
        if changes:
            stack.enter_context(patch.object(Loader, "batch", batch))
        if "rope" in deviations:
            stack.enter_context(patch.object(predict_velocity, "ROPE_SCALE", ROPE_SCALE))
        yield


def shift_latents(group: Group) -> Group:
    """``(moment - shift_factor) * scaling_factor`` by the factors of the published VAE. Inference has no shift."""
    return replace(group, latents=group.latents - SHIFT)


def pad_captions(group: Group) -> Group:
    """Every caption has ``NUM_TOKENS`` tokens, of which those past its end are copies of its last; there is no mask."""
    embeds: Tensor = group.prompt_embeds
    lengths = torch.tensor(group.text_lengths or [embeds.shape[1]] * len(embeds))
    tokens = torch.minimum(torch.arange(NUM_TOKENS), lengths[:, None] - 1)
    return replace(group, prompt_embeds=embeds[torch.arange(len(embeds))[:, None], tokens], text_lengths=None)


CHANGES = {"latents": shift_latents, "captions": pad_captions}
"""The deviations of what a batch holds. The third, ``rope``, is one of the forward pass."""


def table_rows(results: Mapping[str, Any], seeds: int) -> list[dict[str, Any]]:
    """For each variant the loss over the base's, on each of ``JUDGED_ON``: mean, lowest and highest of the seeds."""
    base = {name: mean(results["base"][name]) for name in JUDGED_ON}
    rows = []
    for variant in VARIANTS:
        row: dict[str, Any] = {"trained with": variant}
        for name in JUDGED_ON:
            shares = [mean(results[job_name(variant, seed)][name]) / base[name] for seed in range(seeds)]
            row[name] = {"mean": mean(shares), "lowest": min(shares), "highest": max(shares)}
        rows.append(row)
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]], seeds: int, steps: int) -> None:
    """The table, as it stands in the docs."""
    table = console.table(f"Losses over the base's, {seeds} seeds, {steps} steps", "trained with", *JUDGED_ON)
    for row in rows:
        cells = [f"{row[n]['mean']:.3f} ({row[n]['lowest']:.3f} to {row[n]['highest']:.3f})" for n in JUDGED_ON]
        table.add_row(row["trained with"], *cells)
    console.out.print(table)


def machine() -> dict[str, Any]:
    """What the numbers came from."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "processors": os.cpu_count(), "gpu": gpu}


def draw(place: Path, recipe: judged.Recipe, target: Path) -> None:
    """Prompts of the demo, drawn as inference does: by the base and with two LoRAs of the first seed."""
    validation, prompts = recipe.train.validation, recipe.train.validation.prompts[:NUM_PICTURES]
    loras = {"base": None, **{row: train(place, recipe, variant, 0) for variant, row in ROWS.items()}}
    paint = partial(judged.draw, Path(recipe.model.source), device=recipe.train.device)
    rows = [
        (row, paint(lora, cache=place / "images", validation=validation, prompts=prompts))
        for row, lora in loras.items()
    ]
    grid = sheet.grid(rows, [prompt.split(",")[0] for prompt in prompts])
    write_whole(target, partial(grid.save, format="PNG", optimize=True))


if __name__ == "__main__":
    command_line.run(main)
