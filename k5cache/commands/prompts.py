"""``k5cache prompts``: the prompts that a cache holds for validation and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.commands.arguments import CachePath, Device, Json, Model, Wait, model_of_cache
from k5cache.commands.listing import print_some, shorten
from k5cache.shared import console, help, interrupt
from k5cache.shared.foreign import shown
from k5cache.shared.units import count_of

if TYPE_CHECKING:
    from k5cache.upkeep.prompts import Added

prompts = typer.Typer(
    cls=help.Grouped, help="Prompts that a cache holds for validation and sampling.", no_args_is_help=True
)


@prompts.command(
    epilog=help.examples(
        'k5cache prompts add cache/cats "a cat on a roof"',
        'k5cache prompts add cache/edits "make it night" --source day.jpg',
    )
)
def add(
    cache: CachePath,
    prompts: Annotated[list[str], typer.Argument(help="One or more, each in quotes.")],
    source: Annotated[
        Path | None, typer.Option(help="For image-to-image: the picture that the prompts are instructions for.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    wait: Wait = 0,
    as_json: Json = False,
) -> None:
    """Encode more prompts into a cache. Loads encoders only for what is not in the cache yet."""
    from k5cache.store.manifest import read_manifest
    from k5cache.upkeep.edits import add_edits
    from k5cache.upkeep.prompts import add_prompts

    model_config = model_of_cache(cache, read_manifest(cache), model)
    again = f"Stopped. To go on, run the same command: {console.this_command()}"
    with interrupt.saying(again), console.progress() as bars:
        if source is None:
            added = add_prompts(cache, prompts, model_config, device, bars, wait)
        else:
            added = add_edits(cache, str(source), prompts, model_config, device, bars, wait)
    if as_json:
        console.print_json(added)
    else:
        print_added(added, cache)
        draw = console.command("k5train", "sample", "RUN", source=source, prompt=prompts[0])
        console.next_step("Next, draw it with a run that was trained on this cache", draw)


@prompts.command(
    "list", epilog=help.examples("k5cache prompts list cache/cats", "k5cache prompts list cache/cats --json")
)
def list_(cache: CachePath, as_json: Json = False) -> None:
    """List the prompts, or the pairs of a picture and an instruction, that can be drawn from a cache."""
    from k5cache.store.manifest import read_manifest

    manifest = read_manifest(cache)
    held = [prompt for prompt in manifest.prompts if prompt]
    if as_json:
        edits = [{"source": edit.source, "prompt": edit.prompt} for edit in manifest.edits]
        console.print_json({"prompts": held, "edits": edits})
        return
    is_i2i = manifest.kind == "i2i"
    lines = [f"{edit.source}: {edit.prompt}" for edit in manifest.edits] if is_i2i else held
    for line in lines:
        console.out.print(shown(line, len(line)), markup=False)
    add_one = console.command("k5cache", "prompts", "add", cache, "PROMPT", source="PICTURE" if is_i2i else None)
    if not lines:
        console.note(f"{cache} holds no {'pairs' if is_i2i else 'prompts'} to draw")
        console.next_step("Next, add one", add_one)
    elif is_i2i:
        first = manifest.edits[0]
        draw = console.command("k5train", "sample", "RUN", source=first.source, prompt=first.prompt)
        console.next_step("Next, draw one with a run that was trained on this cache", draw)
    else:
        draw = console.command("k5train", "sample", "RUN", prompt=held[0])
        console.next_step("Next, draw one with a run that was trained on this cache", draw)


def print_added(added: Added, root: Path) -> None:
    """Which prompts were encoded, and which were there."""
    encoded = [shorten(prompt) or "(the empty prompt)" for prompt in added.encoded]
    print_some(f"{_prompts(encoded)} encoded into {root}", encoded, "green")
    already_there = [shorten(prompt) or "(the empty prompt)" for prompt in added.already_there]
    print_some("were there already", already_there, "dim", one="was there already")
    cut = [f"{shorten(prompt)} (last {count_of(count, 'character')})" for prompt, count in added.truncated]
    print_some(f"truncated {_prompts(cut)}", cut, "yellow")


def _prompts(entries: list[str]) -> str:
    return "prompt" if len(entries) == 1 else "prompts"
