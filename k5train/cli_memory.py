"""The commands about memory and speed: ``plan``, ``bench`` and ``base``. Parsed here, done elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache import console
from k5cache.errors import RecipeError, RunError

if TYPE_CHECKING:
    import torch

Recipe = Annotated[Path | None, typer.Option("--recipe", "-r", help="A TOML recipe, for example one in pipelines/.")]
Model = Annotated[str | None, typer.Option("--model", help="A folder in the diffusers layout, or a hub repository.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one option: table.key=value. May be repeated.")]

base = typer.Typer(help="The int8 base models on disk, under K5_HOME (~/.cache/k5).", no_args_is_help=True)


def plan(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Without one: --resolution, --text-tokens.")] = None,
    vram: Annotated[str | None, typer.Option(help='Plan for a card of this size: "12GB".')] = None,
    resolution: Annotated[int, typer.Option(help="Pixels of a square picture, without CACHE.")] = 1024,
    text_tokens: Annotated[int, typer.Option(help="Of the longest caption, without CACHE.")] = 512,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
) -> None:
    """Say what a run keeps, recomputes and streams in the VRAM there is. Loads nothing."""
    from k5cache.config import ModelConfig
    from k5cache.recipe import parse, read
    from k5train.config import TrainConfig

    document = read(recipe, options or [])
    if vram is not None:
        document.setdefault("train", {}).setdefault("memory", {})["vram"] = vram
    if model is not None:
        document.setdefault("model", {})["path"] = model
    given = document.get("model", {}).get("path")
    model_config, config = parse(document, {"model": ModelConfig, "train": TrainConfig}, recipe)
    if resolution < 16 or text_tokens < 1:
        raise RecipeError("--resolution is at least 16 and --text-tokens at least 1", "Give the size of your pictures")

    from k5train.planning import plan_without_loading

    shown = plan_without_loading(cache, config, model_config if given else None, (resolution // 16) ** 2, text_tokens)
    table = console.table(shown.title, "what", "how", numbers=())
    for row in shown.rows:
        table.add_row(*row)
    console.out.print(table)


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only this card's own plan, no table of caps and sizes.")
    ] = False,
    baseline: Annotated[bool, typer.Option(help="Also time diffusers + peft + quanto: needs 20 GB of VRAM.")] = True,
    gradients: Annotated[
        bool,
        typer.Option(help="Also what int8 costs: LoRA gradients by kind of layer, the velocity part by part."),
    ] = False,
    features: Annotated[
        bool, typer.Option("--features", help="Time TREAD, rollout, the loader and a sweep's second start instead.")
    ] = False,
    start: Annotated[
        bool, typer.Option("--start", help="Time a run's start, first and second, and its host memory, instead.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a case.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the numbers here, as JSON.")] = None,
) -> None:
    """Time training steps of a full-size transformer with random weights on this card. Downloads nothing."""
    import torch

    from k5train import bench as benching
    from k5train import fidelity
    from k5train.base import vram

    if not torch.cuda.is_available():
        raise RunError(f"There is no GPU that torch {torch.__version__} sees", "Run it where you mean to train")
    device = torch.device("cuda")
    if features and start:
        raise RunError("--features and --start each measure instead of the rest", "Give one of them at a time")
    if out is not None and not out.parent.is_dir():
        raise RunError(f"There is no folder {out.parent}", "Make it first: what is measured is to be written there")
    if features:
        time_features(device, max(steps, 20), out)
        return
    if start:
        time_start(device, out)
        return
    cases = tuple(benching.Case(p, None) for p in ("int8-quanto", "int8-dynamic"))
    cases = cases if quick else benching.within(vram.budget(device, None), (*benching.MUST_REACH, *benching.SIZES))
    ceiling = benching.matmul_ceiling(device)
    results = benching.bench(cases, device, baseline=baseline, num_steps=steps)
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {ceiling:.0f} TFLOP/s bf16 matmul"
    table = console.table(title, *benching.COLUMNS, numbers=benching.COLUMNS[1:5])
    for row in benching.table(results, ceiling):
        table.add_row(*row)
    console.out.print(table)
    if gradients:
        console.out.print(fidelity.compare_gradients(benching.FULL_SIZE, device))
        whole = benching.random_transformer(benching.FULL_SIZE, "no_change", device)
        inputs = [benching.inputs_for(cases[0], benching.FULL_SIZE, device)]
        console.out.print(fidelity.parts_table(fidelity.error_by_part(whole, inputs)))
    if out is not None:
        out.write_text(benching.as_json(results), encoding="utf-8")


def time_start(device: torch.device, out: Path | None) -> None:
    """``bench --start``."""
    import json
    from dataclasses import asdict

    import torch

    from k5train import bench_start as starting

    found = starting.bench_start()
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, full size, random weights"
    table = console.table(title, *starting.COLUMNS, numbers=starting.COLUMNS[1:])
    for row in starting.table(found):
        table.add_row(*row)
    console.out.print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(s) for s in found], indent=2) + "\n", encoding="utf-8")


def time_features(device: torch.device, num_steps: int, out: Path | None) -> None:
    """``bench --features``."""
    import torch

    from k5train import bench_features as features

    found = features.bench_features(device, num_steps=num_steps)
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, defaults, 1024 px, random weights"
    table = console.table(title, *features.COLUMNS, numbers=features.COLUMNS[1:5])
    for row in features.table(found):
        table.add_row(*row)
    console.out.print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(f) for f in found], indent=2) + "\n", encoding="utf-8")


@base.command()
def prepare(recipe: Recipe = None, model: Model = None, options: Set = None) -> None:
    """Quantise the transformer once, into its file. A run does this by itself on first use."""
    from k5cache.config import ModelConfig
    from k5cache.hub import model_folder
    from k5cache.recipe import parse, read
    from k5train.config import TrainConfig

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, config = parse(document, {"model": ModelConfig, "train": TrainConfig}, recipe)

    import torch

    from k5train.base.prepared import prepare
    from k5train.setup import DTYPES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = prepare(model_folder(model_config, ("transformer",)), DTYPES[config.mixed_precision], device)
    console.out.print(str(path), markup=False)


@base.command(name="list")
def list_() -> None:
    """List the prepared bases: file, size, what each was made of."""
    from k5train.base.prepared import home, listed

    found = listed()
    if not found:
        console.out.print(f"There is none under {home()}", markup=False)
        return
    table = console.table(str(home()), "file", "size", "numbers", "made of", numbers=("size",))
    for item in found:
        state = item.dtype if item.is_whole else "damaged: made again when needed"
        table.add_row(item.path.name, console.human_bytes(item.num_bytes), state, item.source)
    console.out.print(table)


@base.command()
def rm(name: Annotated[str, typer.Argument(help="A file's name, or the start of it.")]) -> None:
    """Remove one prepared base. It is made again when it is needed."""
    from k5train.base.prepared import remove

    removed = remove(name)
    console.out.print(f"Removed {removed.path} ({console.human_bytes(removed.num_bytes)})", markup=False)
