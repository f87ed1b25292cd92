"""``k5train sample``: draw more pictures with a run's LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from k5cache.shared import console, interrupt
from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.places import is_there
from k5train.commands.arguments import RunPath, Set, Vram, with_vram
from k5train.commands.lora import lora_in


def sample(
    run: RunPath,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt that the cache holds. May be repeated.")
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option("--source", help="A picture to edit, for image-to-image; each --prompt is drawn on it."),
    ] = None,
    which: Annotated[
        list[str] | None,
        typer.Option("--which", help="A LoRA of the run: final, best, ema or a step. May be repeated. Default: final."),
    ] = None,
    strengths: Annotated[
        list[float] | None, typer.Option("--strength", help="Draw each LoRA at this strength. May be repeated.")
    ] = None,
    loras: Annotated[
        list[Path] | None,
        typer.Option("--lora", help="A LoRA file from anywhere, or another run's folder. May be repeated."),
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the cache is now, if it has moved.")] = None,
    step: Annotated[int | None, typer.Option(help="The same as --which STEP.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The PNG to write. Default: in the run's samples/.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise. Default: the recipe's.")] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also measure each row's loss on the images that the run held out, or else on its probe: one forward "
            "pass for each image and sigma.",
        ),
    ] = False,
    vram: Vram = None,
    options: Set = None,
) -> None:
    """Draw more pictures with a run's LoRAs or others: a row for the base model, and one for each LoRA and strength."""
    with interrupt.saying("Stopped: no picture was written"):  # during the imports too, which take seconds
        from k5cache.shared.checkpoint import check_known
        from k5cache.shared.model import ModelConfig
        from k5cache.shared.recipe import parse
        from k5train.options.train import TrainConfig
        from k5train.runs.folder import open_run
        from k5train.runs.recipe import read_recipe
        from k5train.training.more_pictures import check_out, resample
        from k5train.training.which_loras import choose

        opened, _, config, recorded_cache = open_run(run)
        document = read_recipe(opened.root, with_vram(options, vram))
        if sources and not prompts:
            raise RecipeError("--source is given without a prompt", "Say what to do with the picture: --prompt PROMPT")
        if sources:
            edits = [{"source": str(source), "prompt": prompt} for source in sources for prompt in prompts or []]
            document.give("train.validation.edits", edits, "--source")
        elif prompts:
            document.give("train.validation.prompts", prompts, "--prompt")
            names = dict(zip(config.validation.prompts, config.validation.prompt_names, strict=False))
            document.give("train.validation.prompt_names", [names.get(prompt, "") for prompt in prompts], "--prompt")
        if seed is not None:
            document.give("train.validation.seed", seed, f"--seed {seed}")
        model_config, changed = parse(document, {"model": ModelConfig, "train": TrainConfig})
        measured = config if measure else None
        config = replace(config, validation=changed.validation, memory=changed.memory)
        check_out(opened, out)
        if cache is None and not is_there(recorded_cache):
            moved = console.command("k5train", "sample", run, cache="PATH")
            raise RunError(f"{run} was trained on {recorded_cache}, which is not there", f"If it has moved: {moved}")
        named = [*([] if step is None else [str(step)]), *(which or [])]
        choices = choose(opened, named, [lora_in(file)[0] for file in loras or []], strengths or [])
        if not any(option.startswith("model.") for option in options or []):
            pinned = ["--revision", model_config.revision] if model_config.revision else []
            download = console.command("hf", "download", model_config.source, *pinned)
            check_known(model_config, opened.root, f"If you trust it: {download}")
        drawn = resample(opened, model_config, config, cache or recorded_cache, choices, out, measured)
    if measured:
        _print_losses(drawn.losses, "held-out loss" if measured.validation.split else "probe loss")
    console.out.print(f"Wrote {drawn.grid}", markup=False)


def _print_losses(losses: Sequence[tuple[str, float]], name: str) -> None:
    table = console.table("", "row", name, numbers=(name,))
    for label, loss in losses:
        table.add_row(Text(label), f"{loss:.4f}")
    console.out.print(table)
