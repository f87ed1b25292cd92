"""``k5train configure``: a few questions, then a commented recipe and the two commands that use it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from k5cache.shared import console, interrupt


def configure(
    source: Annotated[
        str | None,
        typer.Argument(help="A folder of images, a table, tars or a dataset; or a recipe that this command has made."),
    ] = None,
    goal: Annotated[str | None, typer.Option(help="What the LoRA teaches: style, character, object or edit.")] = None,
    flavour: Annotated[str | None, typer.Option(help="The published model, such as t2i-lite-sft.")] = None,
    sources: Annotated[
        str | None, typer.Option(help="For image-to-image: the folder with the pictures before the edit.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="A word put before each caption; - for none.")] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="Where captions come from: textfile, metadata, filename or instanceprompt (one for all)."),
    ] = None,
    caption: Annotated[str | None, typer.Option(help="With instanceprompt: the caption of every image.")] = None,
    images: Annotated[str | None, typer.Option(help="How many images a dataset on the hub has.")] = None,
    vram: Annotated[str | None, typer.Option(help="The memory of your card, such as 12GB.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="What is drawn during training. May be repeated; - for none.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The recipe. Default: <name of SOURCE>.toml.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: what is not given has its default.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over a recipe that was edited by hand, without asking.")
    ] = False,
) -> None:
    """Ask what matters and write a commented recipe for both stages.

    Every answer is also an option, and what is given is not asked for. Over a pipe, each line is an answer, and the
    defaults are taken where the lines end. Run again on its own recipe, it offers the answers of that. Loads no model.
    """
    from k5train.configure.ask import Asker
    from k5train.configure.interview import Given, ask_source, interview
    from k5train.configure.target import default_target, read_target, settle
    from k5train.configure.written import cache_of, commands_of, compose_from

    asker = Asker(is_silent=yes)
    if out is None and source is not None and source.endswith(".toml"):
        out, source = Path(source), None
    given = Given(source, goal, flavour, sources, images, trigger, captions, caption, vram, prompts)
    with interrupt.saying("Stopped: nothing was written"):
        target = read_target(out) if out else None
        folder, seen = ask_source(asker, given, target.offered.get("source") if target else None)
        target = target or read_target(default_target(folder))
        offered = target.offered
        if offered:
            console.note(f"{target.path} is there: its answers are offered")
        target = settle(target, compose_from, asker, overwrite)
        answers = interview(folder, seen, given, offered, asker)
        answers |= {"cache": cache_of(folder, offered), "recipe": str(target.path)}
        text = compose_from(answers)
        _show_plan(text, answers)
        target.write(text)
    console.out.print(f"Wrote {target.path}", markup=False)
    encode, run = commands_of(answers)
    console.next_step("Next, encode", encode)
    console.next_step("then train", run)


def _show_plan(text: str, answers: Mapping[str, Any]) -> None:
    """The plan of a recipe, which is checked as both stages check it."""
    from k5cache.options import CacheConfig
    from k5cache.shared.errors import DoesNotFit
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import parse
    from k5train.commands.time_row import time_of
    from k5train.configure.implied import implied
    from k5train.options.train import TrainConfig

    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    try:
        shown = implied(answers, *parse(tomllib.loads(text), schemas))
    except DoesNotFit as error:
        if "cache.resolution" not in error.fix:
            raise
        smaller = "The recipes written here are for 1024 pixels; for 512: k5train recipes quick-512 -o my.toml"
        raise DoesNotFit(error.problem, f"{error.fix}. {smaller}") from None
    table = console.table(shown.title, "what", "how")
    for what, how in shown.rows:
        table.add_row(what, time_of(shown.timed) if what == "time" and shown.timed else how)
    console.out.print(table)
