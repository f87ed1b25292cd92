"""The command line of stage 2. A command parses, calls one function and prints its result."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from k5cache import console
from k5cache.errors import CacheError, RunError
from k5train import cli_lora, cli_memory
from k5train.cli_memory import Model, Recipe, Set

if TYPE_CHECKING:
    from k5cache.config import ModelConfig
    from k5train.config import TrainConfig
    from k5train.loop import Result
    from k5train.sweep import Row

app = typer.Typer(
    help="Train a Kandinsky 5 Image LoRA from a cache, on the card you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(cli_memory.plan)
app.command()(cli_memory.bench)
app.command()(cli_lora.export)
app.command()(cli_lora.merge)
app.command("check-lora")(cli_lora.check_lora)
app.add_typer(cli_memory.base, name="base")

RunPath = Annotated[Path, typer.Argument(help="A folder made by `k5train run`.")]


@app.callback()
def _root() -> None:
    pass


@app.command()
def run(
    cache: Annotated[
        list[Path] | None, typer.Argument(help="A cache, or several. Default: the recipe's, or the only one in cache/.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run. Default: runs/<name of CACHE>.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    is_new: Annotated[bool, typer.Option("--new", help="Never go on with a run that was stopped.")] = False,
    options: Set = None,
) -> None:
    """Train a LoRA on a cache. Loads the transformer only, never a text encoder.

    The same command again, after a crash or Ctrl-C, goes on where the run was stopped.
    """
    model_config, config = read_recipe(recipe, model, options)
    from k5train.start import named, start

    caches = cache or ([] if config.data else [find_cache(Path("cache"))])
    chosen = model_config or made_with(caches[0] if caches else Path(config.data[0].cache))
    print_result(start(*named(caches, config), out, chosen, is_new))


@app.command()
def resume(
    run: RunPath,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the cache is now, if it moved.")] = None,
    options: Set = None,
) -> None:
    """Go on with a run that was stopped, exactly as if it had not been; or train a finished one for more steps."""
    from k5train import start

    print_result(start.resume(run, options or [], cache))


@app.command()
def sweep(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="train.option=a,b,c. All combinations of several are run.")
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", help="A TOML file of [[run]] tables instead: name and options.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: sweeps/<name of CACHE>.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
) -> None:
    """Train many LoRAs over one cache with the base loaded once, and compare them.

    The same command again skips what is finished and goes on with what was stopped.
    """
    from k5cache.recipe import read
    from k5train import sweep as sweeping

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, runs = sweeping.settings(document, grid or [], listed, recipe)
    if cache is None and not runs[0].config.data:
        cache = find_cache(Path("cache"))
    if not document.get("model"):
        model_config = made_with(cache or Path(runs[0].config.data[0].cache))
    name = cache.resolve().name if cache else Path(runs[0].config.data[0].cache).name
    target = out or Path("sweeps") / name
    rows, pictures = sweeping.sweep(cache, target, model_config, runs)
    print_sweep(rows)
    if pictures:
        console.out.print(f"pictures {pictures}", markup=False)
    ended_well = [row for row in rows if not row.problem]
    if not ended_well:
        raise RunError("No run came to its end", "Their problems are above; often a lower train.optim.lr helps")
    best = min(ended_well, key=lambda r: r.best_loss or r.last_loss or float("inf"))
    console.next_step("Next, draw more with the lowest loss", console.command("k5train", "sample", target / best.label))


@app.command()
def sample(
    run: RunPath,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt that the cache holds. May be repeated.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Draw this checkpoint. Default: the finished LoRA.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG grid. Default: in the run's samples/.")] = None,
    seed: Annotated[int | None, typer.Option(help="Noise. Default: the recipe's.")] = None,
    options: Set = None,
) -> None:
    """Draw more pictures with a run's LoRA, the base model's beside them."""
    from k5cache.recipe import parse, read
    from k5train.checkpoint import open_run
    from k5train.config import MemoryConfig, ValidationConfig
    from k5train.resample import resample

    opened, model_config, config, cache = open_run(run)
    document = read(opened.root / "recipe.toml", options or [])
    chosen = document.setdefault("train", {}).setdefault("validation", {})
    chosen |= {"prompts": prompts} if prompts else {}
    chosen |= {"seed": seed} if seed is not None else {}
    validation, memory = parse(document["train"], {"validation": ValidationConfig, "memory": MemoryConfig})
    grid = resample(opened, model_config, replace(config, validation=validation, memory=memory), cache, step, out)
    console.out.print(f"Wrote {grid}", markup=False)


@app.command()
def selftest(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Prove on this machine that what is trained is what diffusers computes. Exit code 1 where it is not.

    One step, its gradients and a drawing, of our transformer and of diffusers' own. With --model and no cache, on
    random rows; with neither, on a toy model. Loads no text encoder.
    """
    from contextlib import ExitStack

    from k5cache.compare import print_comparisons
    from k5cache.config import ModelConfig
    from k5cache.hub import model_folder
    from k5cache.store.reader import open_cache
    from k5cache.toy import only_cache, toy_model
    from k5train.selftest import selftest as run
    from k5train.setup import pick_device

    root = cache or (None if model else only_cache("k5train selftest"))
    model_config, config = read_recipe(recipe, model, options)
    is_named = model_config is not None
    with ExitStack() as stack:
        opened = open_cache(root) if root else None
        if not model_config:
            model_config = made_with(root) if root else ModelConfig(path=str(stack.enter_context(toy_model())))
        folder = model_folder(model_config, ("transformer", "vae", "scheduler"))
        found = run(opened, folder, config, pick_device(config.device, folder))
    what = str(root or model or (model_config.source if is_named else "a toy model"))
    if as_json:
        console.print_json(found)
    if any(one.is_failed for one in found) if as_json else not print_comparisons(f"Selftest of {what}", found):
        raise typer.Exit(1)


@app.command()
def options() -> None:
    """List every option with its default, as a recipe to copy from: [model], [cache] and [train]."""
    from k5cache.config import CacheConfig, ModelConfig
    from k5cache.recipe import document_options
    from k5train.config import TrainConfig

    text = document_options({"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig})
    console.out.print(text, markup=False)


def find_cache(parent: Path) -> Path:
    """The only cache under ``parent``; a person at a terminal is asked which one, where there are several.

    Raises:
        CacheError: there is none, or there are several and nobody to ask.
    """
    found = sorted(p.parent for p in parent.glob("*/manifest.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CacheError(f"There is no cache under {parent}/", "Make one first: k5cache encode datasets/my_images")
    names = ", ".join(str(p) for p in found)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CacheError(f"There are {len(found)} caches: {names}", f"Say which one: k5train run {found[0]}")
    for number, path in enumerate(found, 1):
        console.err.print(f"  {number}  {path}", markup=False)
    number = typer.prompt("Which cache", type=int, err=True)
    if not 1 <= number <= len(found):
        raise CacheError(f"There is no cache number {number}", f"Say which one: k5train run {found[0]}")
    return found[number - 1]


def read_recipe(
    recipe: Path | None, model: str | None, options: list[str] | None
) -> tuple[ModelConfig | None, TrainConfig]:
    """[model], None where nothing is said of it, and [train] of a recipe with its overrides."""
    from k5cache.config import ModelConfig
    from k5cache.recipe import parse, read
    from k5train.config import TrainConfig

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, config = parse(document, {"model": ModelConfig, "train": TrainConfig}, recipe)
    return model_config if document.get("model") else None, config


def made_with(cache: Path) -> ModelConfig:
    """The model that a cache was encoded with, for a recipe that names none; its flavour where the folder is gone."""
    from k5cache.config import ModelConfig, model_of
    from k5cache.store.manifest import read_manifest

    made = model_of(read_manifest(cache).recipe)
    is_repository = made.path is None or made.path.count("/") == 1
    return made if is_repository or Path(str(made.path)).is_dir() else ModelConfig(made.flavour)


def print_result(result: Result) -> None:
    """What ends a run."""
    reasons = {"max_hours": ", the time it was given", "patience": ", as the held-out loss no longer fell"}
    console.out.print(
        f"Trained {result.steps} steps in {console.human_seconds(result.seconds)}{reasons.get(result.ended_by, '')}, "
        f"loss {result.first_loss:.4f} -> {result.last_loss:.4f} (means of the first and last tenth)",
        markup=False,
    )
    console.out.print(f"LoRA     {result.lora}", markup=False)
    console.out.print(f"loads by {result.loads_by}: loaded back by diffusers and compared", markup=False)
    if result.best_step == 0:
        console.warn(f"The held-out loss was never below the base's, {result.best_loss:.4f}")
    elif result.best_step is not None:
        best = result.lora.with_name(f"{result.lora.stem}-best.safetensors")
        console.out.print(
            f"best     {best}, step {result.best_step}, held-out loss {result.best_loss:.4f}", markup=False
        )
    if result.grid:
        console.out.print(f"pictures {result.grid}", markup=False)
    console.next_step("Next, draw more", console.command("k5train", "sample", result.lora.parent))


def print_sweep(rows: list[Row]) -> None:
    """One line a run."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "steps", "loss", "held out", "time", "started in", "problem"):
        table.add_column(column, overflow="fold")
    for row in rows:
        losses = [f"{loss:.4f}" if loss is not None else "" for loss in (row.last_loss, row.best_loss)]
        times = [console.human_seconds(s) if s is not None else "" for s in (row.seconds, row.seconds_to_start)]
        cells = [row.label, str(row.steps), *losses, *times, row.problem or ""]
        table.add_row(*(Text(cell) for cell in cells))
    console.out.print(table)


def main() -> None:
    """Entry point of ``k5train``."""
    # Freed memory is joined again: what torch reserves is then what the plan says. Read when torch is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    console.run(app)
