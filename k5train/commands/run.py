"""``k5train run`` and ``k5train resume``: train a LoRA, or continue a run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console, interrupt
from k5cache.shared.recipe import to_dict
from k5cache.shared.template import PIPELINES
from k5cache.shared.units import count_of
from k5train.commands.arguments import (
    Gpus,
    Model,
    Recipe,
    RunPath,
    Set,
    Vram,
    find_cache,
    model_of_cache,
    read_recipe,
    with_vram,
)
from k5train.commands.ranks import all_ranks, follow, start_others

if TYPE_CHECKING:
    from k5train.training.result import Result

LOST_GAIN = 0.1  # a finished LoRA that lost less than this share of what the best gained is as good for most uses


def run(
    cache: Annotated[
        list[Path] | None, typer.Argument(help="A cache, or several. Default: the recipe's, or the only one in cache/.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder. Default: runs/<name of CACHE>.")
    ] = None,
    recipe: Recipe = None,
    model: Model = None,
    is_new: Annotated[
        bool, typer.Option("--new", help="Start a new run, even if this command was stopped before.")
    ] = False,
    vram: Vram = None,
    gpus: Gpus = None,
    options: Set = None,
) -> None:
    """Train a LoRA on a cache. Loads the transformer only, never a text encoder.

    After a crash or Ctrl-C, the same command continues where the run stopped.
    """
    model_config, config = read_recipe(recipe, model, with_vram(options, vram))
    caches = cache or ([] if config.data else [find_cache(Path("cache"))])
    start_others(gpus, *([] if cache else caches))
    given = {"caches": [str(path) for path in caches], "out": str(out), "model": str(model), "new": is_new}
    with _before_the_first_step(), all_ranks(config.device, {"train": to_dict(config), **given}) as ranks:
        if not ranks.is_first:
            follow(ranks)
            return
        from k5train.training.start import named, start

        chosen = model_config or model_of_cache(caches[0] if caches else Path(config.data[0].cache))
        result = start(*named(caches, config), out, chosen, is_new, ranks)
    print_result(result)


def resume(
    run: RunPath,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the cache is now, if it has moved.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Go on from the state of this step. Default: the newest; the last two are kept.")
    ] = None,
    vram: Vram = None,
    gpus: Gpus = None,
    options: Set = None,
) -> None:
    """Continue a run that was stopped, exactly as if it had not stopped, or train a finished one for more steps."""
    changed = with_vram(options, vram)
    start_others(gpus)
    with _before_the_first_step(), all_ranks(_device_of(run, changed), {"set": changed, "step": step}) as ranks:
        if not ranks.is_first:
            follow(ranks)
            return
        from k5train.training import start

        result = start.resume(run, changed, cache, step, ranks)
    print_result(result)


def _device_of(run: Path, options: list[str]) -> str:
    """``train.device`` of a run, for the process that must choose its GPU before torch is imported."""
    from k5train.parallel.world import world_of
    from k5train.runs.folder import open_run

    return open_run(run, options)[2].device if world_of() else "auto"


def _before_the_first_step() -> AbstractContextManager[None]:
    """What Ctrl-C says before the loop can say it: nothing is lost."""
    return interrupt.saying(
        f"Stopped before training began. To start again, run the same command: {console.this_command()}"
    )


def print_result(result: Result) -> None:
    """How a run ended, and its files."""
    reasons = {
        "max_hours": " and stopped at train.max_hours",
        "patience": " and stopped early, as the held-out loss did not improve",
    }
    console.out.print(
        f"Trained {count_of(result.steps, 'step')} in {console.human_seconds(result.seconds)}"
        f"{reasons.get(result.ended_by, '')}, "
        f"loss {result.first_loss:.4f} -> {result.last_loss:.4f} (means of the first and last tenth)",
        markup=False,
    )
    console.out.print(f"LoRA     {result.lora}", markup=False)
    pipe = f" of a {result.pipeline}" if result.pipeline != PIPELINES["t2i"] else ""
    console.out.print(
        f"loads by {result.loads_by}{pipe}: diffusers has loaded it back and the numbers agree", markup=False
    )
    print_losses(result)
    if result.grid:
        console.out.print(f"pictures {result.grid}", markup=False)
        console.next_step("Next, draw more", console.command("k5train", "sample", result.lora.parent))
    else:
        print_how_to_draw(result)


def print_losses(result: Result) -> None:
    """The held-out loss of the base, of the last step and of the best, each file, and a warning if another file than
    the finished LoRA is the one to use."""
    losses = {"base": result.base_held_out_loss, "final": result.held_out_loss, "best": result.best_loss}
    measured = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
    if measured:
        at = f" at step {result.best_step}" if result.best_loss is not None else ""
        console.out.print(f"held out {', '.join(measured)}{at}", markup=False)
    if result.probe_loss is not None and result.base_probe_loss is not None:
        probe = f"base {result.base_probe_loss:.4f}, final {result.probe_loss:.4f}"
        console.out.print(f"probe    {probe}: the same loss on images that were trained on", markup=False)
    files = lora_files(result)
    for name, (loss, path) in files.items():
        step = f", step {result.best_step}" if name == "best" else ""
        if name != "final":
            console.out.print(f"{name:<8} {path}{step}, held-out loss {loss:.4f}", markup=False)
    if warning := warning_of(result, files):
        console.warn(warning)


def lora_files(result: Result) -> dict[str, tuple[float, Path]]:
    """The held-out loss and the file of each LoRA that a run wrote and measured. What was best before the first step
    is no LoRA of this run."""
    losses = {
        "final": (result.held_out_loss, result.lora.stem),
        "best": (result.best_loss if result.best_step else None, f"{result.lora.stem}-best"),
        "EMA": (result.ema_held_out_loss, f"{result.lora.stem}-ema"),
    }
    return {
        name: (loss, result.lora.with_name(f"{stem}.safetensors"))
        for name, (loss, stem) in losses.items()
        if loss is not None
    }


def warning_of(result: Result, files: Mapping[str, tuple[float, Path]]) -> str | None:
    """What is wrong with the finished LoRA, by the held-out loss, and which file to use; None if nothing is."""
    base, final = result.base_held_out_loss, result.held_out_loss
    if base is None and result.best_step == 0:
        base = result.best_loss
    lowest, path = min(files.values(), default=(inf, result.lora))
    if base is not None and lowest >= base:
        return (
            f"The held-out loss was never below the {base:.4f} of before the first step: no LoRA of this run is better"
            " than what it started from"
        )
    use = f"Use {path}, which has {lowest:.4f}"
    if not files:
        return None
    if final is None:
        return f"The held-out loss of the finished LoRA is not a finite number. {use}"
    if base is not None and final > base:
        return f"The run ended worse than it began: held-out loss {final:.4f}, {base:.4f} before the first step. {use}"
    gain = lowest / 10 if base is None else base - lowest
    if final - lowest <= LOST_GAIN * gain:
        return None
    is_best = final - min(loss for name, (loss, _) in files.items() if name != "EMA") <= LOST_GAIN * gain
    than = "its average" if is_best else "it was before"
    return f"The run ended worse than {than}: held-out loss {final:.4f}. {use}"


def print_how_to_draw(result: Result) -> None:
    """A run without validation prompts or pairs has none to draw again: how to put one into its cache, and draw it."""
    from k5train.runs.recipe import cache_of, read_facts

    is_pair = result.pipeline != PIPELINES["t2i"]
    root, source = result.lora.parent, "PICTURE" if is_pair else None
    add = console.command("k5cache", "prompts", "add", cache_of(root, read_facts(root)), "PROMPT", source=source)
    console.next_step(f"Next, put a {'pair' if is_pair else 'prompt'} into the cache", add)
    console.next_step("and draw it", console.command("k5train", "sample", root, source=source, prompt="PROMPT"))
