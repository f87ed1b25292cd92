"""The command line of stage 1. A command parses, calls one function and prints its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.commands.arguments import (
    CachePath,
    Device,
    Json,
    Model,
    Out,
    Recipe,
    Rehash,
    Set,
    Source,
    Vram,
    Wait,
    _configs,
    _model_of,
    _then_train,
    _vram,
)
from k5cache.shared import console

app = typer.Typer(
    help="Encode images and captions once, for as many Kandinsky 5 LoRAs as you like.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def encode(
    source: Source,
    out: Out = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    device: Device = "auto",
    update: Annotated[
        bool, typer.Option("--update", help="Where the recipe differs, encode again what it changes.")
    ] = False,
    rehash: Rehash = False,
    repair: Annotated[bool, typer.Option("--repair", help="Check every byte; encode damaged shards again.")] = False,
    wait: Wait = 0,
    vram: Vram = None,
    as_json: Json = False,
) -> None:
    """Encode images and captions into a cache, or bring one up to date.

    SOURCE is a folder of images with captions beside them; a .csv, .jsonl, .parquet or .tar, or a pattern of them
    ("cats-*.tar"); a folder of such files; or a dataset of the hub (owner/name). A greyscale cat.mask.png
    beside cat.jpg is its mask. Captions, crops, flips and size guards are options of [cache]: see `k5cache options`.
    """
    from k5cache.commands.info import print_report
    from k5cache.encode.encode import encode as run
    from k5cache.encode.request import EncodeOptions
    from k5cache.encoders.device import check_name
    from k5cache.sources.find import default_name

    model_config, cache_config, prompts = _configs(recipe, model, options)
    root = out or Path("cache") / default_name(source)
    chosen = EncodeOptions(update, rehash, repair, wait, check_name(device), _vram(vram))
    with console.progress() as bars:
        report = run(source, root, model_config, cache_config, prompts, bars, chosen)
    if as_json:
        console.print_json(report)
        return
    print_report(report, root)
    named = [option for option in options or [] if option.startswith("model.")]
    again = {"recipe": recipe, "model": model, "set": named}
    console.next_step("Next, train a LoRA", console.command("k5train", "run", root, **again))


@app.command()
def plan(
    source: Source,
    out: Out = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    device: Device = "auto",
    vram: Vram = None,
    as_json: Json = False,
) -> None:
    """Show what encode would take with the same arguments: mode, VRAM, RAM, disk and time. Loads no encoder."""
    from k5cache.encode.estimate import rows
    from k5cache.encode.request import EncodeOptions, look
    from k5cache.encode.update import estimate
    from k5cache.encoders.device import check_name
    from k5cache.sources.find import default_name

    model_config, cache_config, prompts = _configs(recipe, model, options)
    root = out or Path("cache") / default_name(source)
    chosen = EncodeOptions(update=True, device=check_name(device), vram=_vram(vram))
    asked = look(source, root, model_config, cache_config, prompts, chosen)
    with console.progress() as bars:
        made = estimate(asked, chosen, bars)
    if as_json:
        console.print_json(made)
        return
    table = console.table("Stage 1", "what", "value")
    for line in rows(made):
        table.add_row(*line)
    console.out.print(table)
    again = {"recipe": recipe, "model": model, "set": options, "vram": vram}
    again["device"] = None if device == "auto" else device
    console.next_step("Next, encode", console.command("k5cache", "encode", source, "-o", root, **again))


@app.command()
def diff(
    source: Source,
    out: Out = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    rehash: Rehash = False,
    as_json: Json = False,
) -> None:
    """Show what encode would do with the same arguments. Loads no model and writes nothing."""
    from k5cache.commands.reports import print_preview
    from k5cache.encode.request import EncodeOptions, look
    from k5cache.encode.update import preview
    from k5cache.sources.find import default_name

    model_config, cache_config, prompts = _configs(recipe, model, options)
    root = out or Path("cache") / default_name(source)
    asked = look(source, root, model_config, cache_config, prompts, EncodeOptions(update=True))
    with console.progress() as bars:
        would = preview(asked, rehash, bars)
    if as_json:
        console.print_json(would)
    else:
        print_preview(would, root)


@app.command()
def info(cache: CachePath, as_json: Json = False) -> None:
    """Show what a cache holds: items, buckets, caption lengths, sizes, model and recipe."""
    from k5cache.commands.info import info_json, print_info
    from k5cache.store.reader import open_cache

    opened = open_cache(cache)
    if as_json:
        console.print_json(info_json(opened))
        return
    print_info(opened)
    _then_train(cache, opened.manifest)


@app.command()
def verify(
    cache: CachePath,
    reencode: Annotated[int, typer.Option(help="Encode this many random rows again and compare.")] = 0,
    source: Annotated[
        Path | None, typer.Option(help="Where the images are; without it --reencode compares captions only.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Which rows are drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Check every byte and number of a cache. Lists every problem; exit code 1 where there is one."""
    from k5cache.commands.reports import print_verified
    from k5cache.commands.verify import verify as run

    again = None
    with console.progress() as bars:
        task = bars.add_task("verifying", total=None, unit="byte", note="")
        found = run(cache, lambda num_bytes: bars.advance(task, num_bytes))
        bars.remove_task(task)
        if reencode and not found.problems:
            from k5cache.commands.reencode import reencode as run_again
            from k5cache.store.reader import open_cache

            opened = open_cache(cache)
            again = run_again(opened, reencode, source, _model_of(opened.manifest, model), device, bars, seed)
            found = again.added_to(found)
    if as_json:
        console.print_json({"verified": found, "reencoded": again})
    else:
        print_verified(found, again)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def show(
    cache: CachePath,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG. Default: <CACHE>.png beside the cache.")] = None,
    count: Annotated[int, typer.Option(help="Random items to show.", min=1, max=400)] = 16,
    model: Model = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Which items are drawn.")] = 0,
) -> None:
    """Draw a contact sheet of what will be trained on: decoded latents with bucket and caption."""
    from k5cache.commands.show import show as run
    from k5cache.store.reader import open_cache

    opened = open_cache(cache)
    target = out or cache.resolve().with_name(f"{cache.resolve().name}.png")
    with console.progress() as bars:
        number = run(opened, target, count, _model_of(opened.manifest, model), device, bars, seed)
    console.out.print(f"Wrote {target}: {number} of {len(opened)} items", markup=False)


@app.command()
def gc(
    cache: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    wait: Wait = 0,
    as_json: Json = False,
) -> None:
    """Delete rows that no item and no prompt needs any more, and what a crash left.

    Not while a run trains on this cache: it may need rows of an index that has been replaced.
    """
    from k5cache.commands.gc import collect
    from k5cache.commands.reports import print_collected

    found = collect(cache, dry_run, wait)
    if as_json:
        console.print_json(found)
    else:
        print_collected(found, cache, dry_run)


@app.command()
def merge(
    caches: Annotated[list[Path], typer.Argument(help="Two or more caches with the same recipe.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The merged cache: a new folder.")],
    as_json: Json = False,
) -> None:
    """Put caches together, for example of parts encoded on several machines."""
    from k5cache.commands.merge import merge as run
    from k5cache.commands.reports import print_merged
    from k5cache.store.manifest import read_manifest

    made = run(caches, out)
    if as_json:
        console.print_json(made)
        return
    print_merged(made, out)
    _then_train(out, read_manifest(out))


prompts_app = typer.Typer(help="Prompts that a cache holds for validation and sampling.", no_args_is_help=True)


app.add_typer(prompts_app, name="prompts")


@prompts_app.command("add")
def prompts_add(
    cache: CachePath,
    prompts: Annotated[list[str], typer.Argument(help="One or more, each in quotes.")],
    model: Model = None,
    device: Device = "auto",
    wait: Wait = 0,
    as_json: Json = False,
) -> None:
    """Encode more prompts into a cache. Loads the text encoders, only for prompts that are not there."""
    from k5cache.commands.prompts import add_prompts
    from k5cache.commands.reports import print_added
    from k5cache.store.manifest import read_manifest

    model_config = _model_of(read_manifest(cache), model)
    with console.progress() as bars:
        added = add_prompts(cache, prompts, model_config, device, bars, wait)
    if as_json:
        console.print_json(added)
    else:
        print_added(added, cache)


@app.command()
def selftest(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Where its images are. Default: datasets/<name of CACHE>.")
    ] = None,
    model: Model = None,
    count: Annotated[int, typer.Option(help="Rows of the cache to compare.", min=1)] = 4,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Prove on this machine that what is cached is what diffusers computes. Exit code 1 where it is not.

    A few captions and images go through our encoders and through diffusers' own pipeline. With --model and no cache,
    captions and pictures of ours; with neither, on a toy model.
    """
    from contextlib import ExitStack

    from k5cache.commands.selftest import selftest as run
    from k5cache.encoders.device import pick_device
    from k5cache.shared.comparison import print_comparisons
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.selftest_model import only_cache, toy_model
    from k5cache.store.reader import open_cache

    root = cache or (None if model else only_cache("k5cache selftest"))
    with ExitStack() as stack:
        opened = open_cache(root) if root else None
        toy = None if opened or model else stack.enter_context(toy_model())
        chosen = _model_of(opened.manifest, model) if opened else ModelConfig(path=model or str(toy))
        bars = stack.enter_context(console.progress())
        found = run(opened, chosen, source, count, pick_device(device), bars)
    what = str(root or model or "a toy model")
    if as_json:
        console.print_json(found)
    if any(one.is_failed for one in found) if as_json else not print_comparisons(f"Selftest of {what}", found):
        raise typer.Exit(1)


@app.command()
def options() -> None:
    """List every option of [model] and [cache] with its default, as a recipe to copy from."""
    from k5cache.options import CacheConfig
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import document_options

    console.out.print(document_options({"model": ModelConfig, "cache": CacheConfig}), markup=False)


@app.command()
def bench(
    encoders: Annotated[
        bool, typer.Option("--encoders", help="Text encoders and VAE of full size on this GPU; writes 14 GB to DIR.")
    ] = False,
    store: Annotated[
        bool, typer.Option("--store", help="Rows read at random from shards, beside other formats.")
    ] = False,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to write. Default: the temporary folder.")] = None,
    vram: Annotated[str, typer.Option(help="The cap under which --encoders streams.")] = "4GB",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure stage 1 with random weights and rows, beside what others do. Downloads nothing."""
    if not encoders and not store:
        from k5cache.shared.errors import K5Error

        raise K5Error("There is nothing to measure", "Say --encoders, --store or both")
    found: dict[str, object] = {}
    if store:
        from k5cache.bench import reading

        rows = reading.bench_store(folder=folder)
        found["store"] = reading.as_json(rows)
        if not as_json:
            reading.print_bench(rows)
    if encoders:
        from k5cache.bench import encoding
        from k5cache.encoders.device import pick_device

        measured = encoding.bench(pick_device(device), _vram(vram), folder)
        found["encoders"] = encoding.as_json(measured)
        if not as_json:
            encoding.print_bench(measured)
    if as_json:
        console.print_json(found)


def main() -> None:
    """Entry point of ``k5cache``."""
    console.run(app)
