"""What a cache holds and what an encode did, as tables for a person."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text

from k5cache.commands.reports import print_changes, short, some
from k5cache.shared import console
from k5cache.shared.model import model_name

if TYPE_CHECKING:
    from k5cache.encode.request import EncodeReport
    from k5cache.store.reader import Cache


def print_report(report: EncodeReport, root: Path) -> None:
    """The summary that ends an encode: what changed, what was computed for it, what was left out."""
    if report.is_unchanged:
        console.out.print(
            f"{root} is up to date: {report.num_items} items, {console.human_bytes(report.num_bytes)}, nothing to do "
            f"({console.human_seconds(report.seconds)})",
            markup=False,
        )
    else:
        table = console.table(f"Encoded {root}", "what", "images", "captions", numbers=("images", "captions"))
        table.add_row("encoded now", str(report.num_latents), str(report.num_texts))
        table.add_row("reused", str(report.reused_latents), str(report.reused_texts))
        console.out.print(table)
        console.out.print(
            f"{report.num_items} items in {report.num_buckets} buckets, {console.human_bytes(report.num_bytes)}, "
            f"{console.human_seconds(report.seconds)}",
            markup=False,
        )
    print_changes(report.added, report.changed, report.renamed, report.removed, report.reused_latents)
    some("damaged and encoded again", list(report.repaired), "yellow")
    some("skipped", [f"{s.path}: {s.reason}" for s in report.skipped], "yellow")
    cut = [f"{short(caption)} (last {count} characters)" for caption, count in report.truncated]
    some("truncated captions", cut, "yellow")
    some("upscaled, smaller than their bucket", list(report.upscaled), "yellow")


def info_json(cache: Cache) -> dict[str, Any]:
    """The same facts for a script."""
    manifest = cache.manifest
    sizes = cache.columns("bucket_width", "bucket_height")
    buckets = Counter(zip(*(column.to_pylist() for column in sizes.columns), strict=True))
    lengths = sorted(cache.text_lengths().values())
    return {
        "format": manifest.format,
        "items": len(cache),
        "buckets": {f"{width}x{height}": count for (width, height), count in sorted(buckets.items())},
        "captions": len(lengths),
        "tokens": {"min": lengths[0], "median": median(lengths), "max": lengths[-1]} if lengths else None,
        "shards": len(manifest.shards),
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "prompts": list(manifest.prompts),
        "recipe": manifest.recipe,
        "created_by": manifest.created_by,
    }


def print_info(cache: Cache) -> None:
    """A cache at a glance."""
    manifest = cache.manifest
    recipe = manifest.recipe
    buckets: Counter[tuple[int, int]] = Counter()
    lengths = cache.text_lengths()
    columns = cache.columns("bucket_width", "bucket_height", "flipped", "mask_key").to_pydict()
    buckets.update(zip(columns["bucket_width"], columns["bucket_height"], strict=True))
    num_flipped, num_masked = sum(columns["flipped"]), sum(key is not None for key in columns["mask_key"])
    table = console.table(f"{cache.root}", "bucket", "items", "share", numbers=("items", "share"))
    for (width, height), count in sorted(buckets.items(), key=lambda pair: (-pair[1], pair[0])):
        table.add_row(f"{width}x{height}", str(count), f"{count / len(cache):.0%}")
    console.out.print(table)
    facts = console.table("", "what", "value")
    flipped = f", {num_flipped} of them mirrored" if num_flipped else ""
    facts.add_row("items", f"{len(cache)}{flipped}{f', {num_masked} with a mask' if num_masked else ''}")
    facts.add_row("captions and prompts", str(len(lengths)))
    if lengths:
        values = sorted(lengths.values())
        facts.add_row("tokens a caption", f"{values[0]} to {values[-1]}, median {median(values):.0f}")
    for kind in ("latents", "masks", "text"):
        shards = [s for s in manifest.shards if s.kind == kind]
        if not shards:
            continue
        size = console.human_bytes(sum(s.num_bytes for s in shards))
        facts.add_row(kind, f"{sum(s.num_rows for s in shards)} rows in {len(shards)} shards, {size}")
    facts.add_row("prompts for validation", ", ".join(short(p) for p in manifest.prompts if p) or "none")
    facts.add_row("model", Text(model_name(recipe)))
    for table_name in ("latents", "text", "selection"):
        for key, value in recipe.get(table_name, {}).items():
            if value is None:
                continue
            facts.add_row(f"{table_name}.{key}", Text(short(repr(value) if not isinstance(value, str) else value)))
    facts.add_row("made by", ", ".join(f"{k} {v}" for k, v in manifest.created_by.items()))
    facts.add_row("format", str(manifest.format))
    console.out.print(facts)
