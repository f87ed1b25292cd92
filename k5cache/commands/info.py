"""``k5cache info``: what does a cache hold?"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text

from k5cache.commands.arguments import CachePath, Json, suggest_training
from k5cache.commands.listing import print_skipped, print_some, shorten
from k5cache.shared import console
from k5cache.shared.kind import LONG_NAMES
from k5cache.shared.units import count_of
from k5cache.sources.items import Skipped

if TYPE_CHECKING:
    from rich.table import Table

    from k5cache.store.locations import Numbers
    from k5cache.store.reader import Cache


def info(cache: CachePath, as_json: Json = False) -> None:
    """Show what a cache holds: items, buckets, caption lengths, sizes, model and recipe."""
    from k5cache.store.reader import open_cache

    opened = open_cache(cache)
    if as_json:
        console.print_json(info_json(opened))
        return
    console.out.print(_bucket_table(opened))
    console.out.print(_fact_table(opened))
    left_out = opened.manifest.left_out
    print_skipped([Skipped(path, reason) for path, reason in left_out.skipped], cache)
    cut = [f"{shorten(caption)} (last {count_of(count, 'character')})" for _, count, caption in left_out.truncated]
    print_some("truncated captions", cut, "yellow", one="truncated caption")
    suggest_training(cache, opened.manifest)


def info_json(cache: Cache) -> dict[str, Any]:
    """The same facts for a script."""
    manifest = cache.manifest
    lengths = cache.texts().n_tokens
    return {
        "kind": cache.kind,
        "format": manifest.format,
        "items": len(cache),
        "buckets": {f"{width}x{height}": count for (width, height), count in sorted(_items_by_bucket(cache).items())},
        "captions": len(lengths),
        "tokens": _tokens(lengths),
        "shards": len(manifest.shards),
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "prompts": list(manifest.prompts),
        "skipped": [list(pair) for pair in manifest.left_out.skipped],
        "truncated": [[caption, count] for _, count, caption in manifest.left_out.truncated],
        **({"edits": [[edit.source, edit.prompt] for edit in manifest.edits]} if cache.kind == "i2i" else {}),
        **({"part": str(manifest.part)} if manifest.part else {}),
        "recipe": manifest.recipe,
        "created_by": manifest.created_by,
    }


def _tokens(lengths: Numbers) -> dict[str, float] | None:
    """The least, the middle and the most tokens of a caption; None if there is none."""
    if not len(lengths):
        return None
    middle = median(lengths.tolist())
    return {"min": int(lengths.min()), "median": middle, "max": int(lengths.max())}


def _items_by_bucket(cache: Cache) -> dict[tuple[int, int], int]:
    """Number of items of each (width, height)."""
    import numpy as np

    from k5cache.store.columns import numbers, one_array

    columns = cache.columns("bucket_width", "bucket_height")
    width, height = (numbers(one_array(columns[name])).astype("int64") for name in columns.column_names)
    sizes, counts = np.unique(width << 32 | height, return_counts=True)
    return {(size >> 32, size & 0xFFFFFFFF): n for size, n in zip(sizes.tolist(), counts.tolist(), strict=True)}


def _bucket_table(cache: Cache) -> Table:
    table = console.table(f"{cache.root}", "bucket", "items", "share", numbers=("items", "share"))
    for (width, height), count in sorted(_items_by_bucket(cache).items(), key=lambda pair: (-pair[1], pair[0])):
        table.add_row(f"{width}x{height}", str(count), f"{count / len(cache):.0%}")
    return table


def _fact_table(cache: Cache) -> Table:
    manifest = cache.manifest
    table = console.table("", "what", "value")
    table.add_row("for", LONG_NAMES[cache.kind])
    if manifest.part:
        table.add_row("part", manifest.part.name.partition(" ")[2])
    table.add_row("items", _items(cache))
    lengths = cache.texts().n_tokens
    table.add_row("captions and prompts", str(len(lengths)))
    if tokens := _tokens(lengths):
        table.add_row("tokens a caption", f"{tokens['min']} to {tokens['max']}, median {tokens['median']:.0f}")
    for kind in ("latents", "masks", "text"):
        shards = [shard for shard in manifest.shards if shard.kind == kind]
        if shards:
            size = console.human_bytes(sum(shard.num_bytes for shard in shards))
            rows = count_of(sum(shard.num_rows for shard in shards), "row")
            table.add_row(kind, f"{rows} in {count_of(len(shards), 'shard')}, {size}")
    if cache.kind == "i2i":
        pairs = (shorten(f"{edit.source}: {edit.prompt}") for edit in manifest.edits)
        table.add_row("pairs to draw", Text(", ".join(pairs) or "none"))
    else:
        table.add_row("prompts for validation", ", ".join(shorten(p) for p in manifest.prompts if p) or "none")
    _add_recipe(table, manifest.recipe)
    table.add_row("made by", ", ".join(f"{name} {version}" for name, version in manifest.created_by.items()))
    table.add_row("format", str(manifest.format))
    return table


def _items(cache: Cache) -> str:
    import pyarrow.compute as pc

    from k5cache.store.columns import numbers, one_array

    columns = cache.columns("flipped", "mask_key", "caption_keys")
    num_flipped = pc.sum(columns["flipped"]).as_py() or 0
    num_masked = len(columns) - columns["mask_key"].null_count
    flipped = f", {num_flipped} of them mirrored" if num_flipped else ""
    masked = f", {num_masked} with a mask" if num_masked else ""
    num_several = int((numbers(one_array(pc.list_value_length(columns["caption_keys"]))) > 1).sum())
    several = f", {num_several} with several captions" if num_several else ""
    return f"{len(cache)}{flipped}{masked}{several}"


def _add_recipe(table: Table, recipe: dict[str, Any]) -> None:
    from k5cache.shared.model import model_name

    table.add_row("model", Text(model_name(recipe)))
    for name in ("latents", "text", "selection"):
        for key, value in recipe.get(name, {}).items():
            if value is not None:
                table.add_row(f"{name}.{key}", Text(shorten(value if isinstance(value, str) else repr(value))))
