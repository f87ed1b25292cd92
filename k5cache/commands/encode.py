"""``k5cache encode``, and what tells beforehand what it would do: ``k5cache plan`` and ``k5cache diff``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.commands.arguments import (
    Device,
    Json,
    Model,
    Out,
    PartOption,
    Recipe,
    Rehash,
    Set,
    Source,
    Sources,
    Vram,
    Wait,
    default_root,
    read_configs,
    read_part,
    vram_bytes,
)
from k5cache.commands.listing import print_skipped, print_some, shorten
from k5cache.shared import console, interrupt
from k5cache.shared.units import count_of

_MOST_PARTS_NAMED = 16

Engine = Annotated[
    str | None,
    typer.Option(
        help="What runs the encoders: embedded, in this process on one GPU; or ray, on several GPUs and machines."
    ),
]
Gpus = Annotated[int | None, typer.Option(help="Use so many GPUs, with --engine ray. Default there: all.")]
Address = Annotated[
    str | None,
    typer.Option(help="Use this Ray cluster: auto, or HOST:6379. Without it, --engine ray starts one on this machine."),
]

if TYPE_CHECKING:
    from k5cache.encode.preview import Preview
    from k5cache.encode.request import EncodeReport
    from k5cache.store.notes import Part


def encode(
    source: Source,
    sources: Sources = None,
    part: PartOption = None,
    out: Out = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    device: Device = "auto",
    update: Annotated[
        bool, typer.Option("--update", help="If the recipe differs from the cache's, encode again what it changes.")
    ] = False,
    rehash: Rehash = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check every byte of the cache and encode damaged shards again.")
    ] = False,
    wait: Wait = 0,
    vram: Vram = None,
    engine: Engine = None,
    gpus: Gpus = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Encode images and captions into a cache, or bring one up to date.

    SOURCE is a folder of images with captions beside them; a .csv, .jsonl, .parquet or .tar, or a pattern of them
    ("cats-*.tar"); a folder of such files; or a dataset of the hub (owner/name). A greyscale cat.mask.png
    beside cat.jpg is its mask. For image-to-image every image needs a source: cat.source.jpg beside it, cat_start.jpg
    beside cat_end.jpg, the same name in --sources, or a column `source`. Captions, crops, flips and size guards are
    options of [cache]: see `k5cache options`.
    """
    from k5cache.encode.encode import encode_source
    from k5cache.encode.request import EncodeOptions
    from k5cache.engines.choose import engine_for
    from k5cache.shared.device import check_name

    model_config, cache_config, drawn, has_own_caches = read_configs(recipe, model, options, sources)
    own_part = read_part(part)
    root = out or default_root(source, own_part)
    runs_on = engine_for(engine, address, gpus, check_name(device))
    encode_options = EncodeOptions(
        update, rehash, repair, wait, device=device, vram=vram_bytes(vram), part=own_part, engine=runs_on
    )
    with _keeping_what_is_encoded(root), console.progress() as bars:
        report = encode_source(source, root, model_config, cache_config, drawn, bars, encode_options)
    if as_json:
        console.print_json(report)
        return
    print_report(report, root)
    if own_part:
        suggest_merge(root, own_part, default_root(source, None))
        return
    of_the_run = [option for option in options or [] if not option.startswith("cache.")]
    caches = [] if has_own_caches else [root]  # a recipe with [[train.data]] names them itself
    arguments = {"recipe": recipe, "model": model, "set": of_the_run}
    console.next_step("Next, train a LoRA", console.command("k5train", "run", *caches, **arguments))


def suggest_merge(root: Path, part: Part, whole: Path) -> None:
    """Print the command that joins this part with the others, if their names follow from its own."""
    own = f"-{part.numbers[0]}-of-{part.of}"
    parts = [root.with_name(f"{root.name.removesuffix(own)}-{i}-of-{part.of}") for i in range(1, part.of + 1)]
    is_one_of_them = root.name.endswith(own) and part.of <= _MOST_PARTS_NAMED
    names = parts if is_one_of_them else ["EVERY_PART"]
    merged = root.with_name(root.name.removesuffix(own)) if is_one_of_them else whole
    message = f"Next, when all {part.of} parts are encoded" if part.of > 1 else "Next"
    console.next_step(message, console.command("k5cache", "merge", *names, "-o", merged))


def _keeping_what_is_encoded(root: Path) -> AbstractContextManager[None]:
    """Ctrl-C keeps the rows that are encoded. They are in shards; the next encode names them in an index."""
    return interrupt.saying(
        f"Stopped. What is encoded is kept in {root}. To go on, run the same command: {console.this_command()}"
    )


def plan(
    source: Source,
    sources: Sources = None,
    part: PartOption = None,
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
    from k5cache.encode.preview import estimate_encode
    from k5cache.encode.request import EncodeOptions, read_listed_request
    from k5cache.shared.device import check_name
    from k5cache.store.ours import check_root

    model_config, cache_config, drawn, _ = read_configs(recipe, model, options, sources)
    own_part = read_part(part)
    root = out or default_root(source, own_part)
    check_root(root, reads=[source])
    encode_options = EncodeOptions(
        update=True, is_preview=True, device=check_name(device), vram=vram_bytes(vram), part=own_part
    )
    with console.progress() as bars:
        with console.doing(bars, "looking at the images and the model"):
            request = read_listed_request(source, root, model_config, cache_config, drawn, encode_options)
        estimate = estimate_encode(request, encode_options, bars)
    if as_json:
        console.print_json(estimate)
        return
    table = console.table("Stage 1", "what", "value")
    if own_part:
        table.add_row("part", own_part.name.partition(" ")[2])
    for row in rows(estimate):
        table.add_row(*row)
    console.out.print(table)
    print_notices(request.listing.num_multiline, request.listing.notices)
    arguments = {"sources": sources, "part": part, "recipe": recipe, "model": model, "set": options, "vram": vram}
    arguments["device"] = None if device == "auto" else device
    console.next_step("Next, encode", console.command("k5cache", "encode", source, "-o", root, **arguments))


def diff(
    source: Source,
    sources: Sources = None,
    part: PartOption = None,
    out: Out = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    rehash: Rehash = False,
    as_json: Json = False,
) -> None:
    """Show what encode would do with the same arguments. Loads no model and writes nothing."""
    from k5cache.encode.preview import preview_encode
    from k5cache.encode.request import EncodeOptions, read_listed_request
    from k5cache.store.ours import check_root

    model_config, cache_config, drawn, _ = read_configs(recipe, model, options, sources)
    own_part = read_part(part)
    root = out or default_root(source, own_part)
    check_root(root, reads=[source])
    preview_options = EncodeOptions(update=True, is_preview=True, part=own_part)
    with console.progress() as bars:
        with console.doing(bars, "looking at the images and the model"):
            request = read_listed_request(source, root, model_config, cache_config, drawn, preview_options)
        preview = preview_encode(request, rehash, bars)
    if as_json:
        console.print_json(preview)
    else:
        print_preview(preview, root)


def print_report(report: EncodeReport, root: Path) -> None:
    """The summary that ends an encode: what changed, what was computed for it, what was left out."""
    if report.is_unchanged:
        console.out.print(
            f"{root} is up to date: {count_of(report.num_items, 'item')}, "
            f"{console.human_bytes(report.num_bytes)}, nothing to do ({console.human_seconds(report.seconds)})",
            markup=False,
        )
    else:
        table = console.table(f"Encoded {root}", "what", "images", "captions", numbers=("images", "captions"))
        table.add_row("encoded now", str(report.num_latents), str(report.num_texts))
        table.add_row("reused", str(report.reused_latents), str(report.reused_texts))
        console.out.print(table)
        console.out.print(
            f"{count_of(report.num_items, 'item')} in {count_of(report.num_buckets, 'bucket')}, "
            f"{console.human_bytes(report.num_bytes)}, "
            f"{console.human_seconds(report.seconds)}",
            markup=False,
        )
    _print_changes(report.added, report.changed, report.renamed, report.removed, report.reused_latents)
    print_some("damaged and encoded again", report.repaired, "yellow")
    print_skipped(report.skipped, root)
    print_notices(report.num_multiline, report.notices)
    cut = [f"{shorten(caption)} (last {count_of(count, 'character')})" for caption, count in report.truncated]
    print_some("truncated captions", cut, "yellow", one="truncated caption")
    print_some("upscaled, smaller than their bucket", report.upscaled, "yellow")
    _print_sources(report)
    print_some("used although damaged", [f"{image.path}: {image.flaw}" for image in report.flawed], "yellow")


def print_preview(preview: Preview, root: Path) -> None:
    """What an encode would do."""
    print_some(
        "differences of the recipe (encode would need --update)",
        preview.differences,
        "yellow",
        most=99,
        one="difference of the recipe (encode would need --update)",
    )
    table = console.table(f"Encoding into {root} would", "what", "images", "captions", numbers=("images", "captions"))
    table.add_row("encode", str(preview.num_latents), str(preview.num_texts))
    table.add_row("reuse", str(preview.reused_latents), str(preview.reused_texts))
    console.out.print(table)
    _print_changes(preview.added, preview.changed, preview.renamed, preview.removed, preview.reused_latents)
    print_skipped(preview.skipped)
    print_notices(preview.num_multiline, preview.notices)
    print_some("upscaled, smaller than their bucket", preview.upscaled, "yellow")
    _print_sources(preview)
    print_some("used although damaged", [f"{image.path}: {image.flaw}" for image in preview.flawed], "yellow")


def _print_sources(report: EncodeReport | Preview) -> None:
    """What is worth knowing of the sources of image-to-image."""
    print_some("with a stretched source, of another shape than its target", report.stretched, "yellow")
    print_some("with a source that lies on its side, perhaps by a lost EXIF orientation", report.turned, "yellow")
    print_some("source and target are the same file: nothing to learn", report.same_as_target, "yellow")


def print_notices(num_multiline: int, notices: Sequence[str]) -> None:
    """Tell who wrote one caption in several lines what became of it, and how captions came about."""
    if num_multiline:
        have = count_of(num_multiline, "caption file has", "caption files have")
        console.out.print(
            f"{have} several lines: each line is a caption of its own, and each step draws one. For one caption a file,"
            " set cache.caption_lines to whole",
            markup=False,
        )
    for notice in notices:
        console.out.print(notice, markup=False)


def _print_changes(
    added: Sequence[str],
    changed: Sequence[str],
    renamed: Sequence[tuple[str, str]],
    removed: Sequence[str],
    num_reused: int,
) -> None:
    """The paths that differ from the last encode. In a first encode every path is new, so none is listed."""
    print_some("added", added if num_reused or changed or renamed or removed else (), "green")
    print_some("changed", changed, "green")
    print_some("renamed", [f"{before} -> {now}" for before, now in renamed], "green")
    print_some("removed", removed, "yellow")
