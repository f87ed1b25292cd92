"""What a cache holds and what an encode did, as tables for a person."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.text import Text

from k5cache import console

if TYPE_CHECKING:
    from k5cache.encode import EncodeReport
    from k5cache.store.reader import Cache

SHOWN = 5  # examples of a list; the count is always given


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
    _some("added", list(report.added), "green")
    _some("changed", list(report.changed), "green")
    _some("renamed", [f"{before} -> {now}" for before, now in report.renamed], "green")
    _some("removed", list(report.removed), "yellow")
    _some("damaged and encoded again", list(report.repaired), "yellow")
    _some("skipped", [f"{s.path}: {s.reason}" for s in report.skipped], "yellow")
    cut = [f"{_short(caption)} (last {count} characters)" for caption, count in report.truncated]
    _some("truncated captions", cut, "yellow")
    _some("upscaled, smaller than their bucket", list(report.upscaled), "yellow")


def print_info(cache: Cache) -> None:
    """A cache at a glance."""
    manifest = cache.manifest
    recipe = manifest.recipe
    buckets: Counter[tuple[int, int]] = Counter()
    lengths = cache.text_lengths()
    sizes = cache.columns("bucket_width", "bucket_height")
    buckets.update(zip(*(column.to_pylist() for column in sizes.columns), strict=True))
    table = console.table(f"{cache.root}", "bucket", "items", "share", numbers=("items", "share"))
    for (width, height), count in sorted(buckets.items(), key=lambda pair: (-pair[1], pair[0])):
        table.add_row(f"{width}x{height}", str(count), f"{count / len(cache):.0%}")
    console.out.print(table)
    facts = console.table("", "what", "value")
    facts.add_row("items", str(len(cache)))
    facts.add_row("captions and prompts", str(len(lengths)))
    if lengths:
        values = sorted(lengths.values())
        facts.add_row("tokens a caption", f"{values[0]} to {values[-1]}, median {median(values):.0f}")
    for kind in ("latents", "text"):
        shards = [s for s in manifest.shards if s.kind == kind]
        size = console.human_bytes(sum(s.num_bytes for s in shards))
        facts.add_row(kind, f"{sum(s.num_rows for s in shards)} rows in {len(shards)} shards, {size}")
    facts.add_row("prompts for validation", ", ".join(_short(p) for p in manifest.prompts if p) or "none")
    facts.add_row("model", Text(str(recipe["model"]["source"])))
    for table_name in ("latents", "text", "selection"):
        for key, value in recipe[table_name].items():
            facts.add_row(f"{table_name}.{key}", Text(_short(repr(value) if not isinstance(value, str) else value)))
    facts.add_row("made by", ", ".join(f"{k} {v}" for k, v in manifest.created_by.items()))
    facts.add_row("format", str(manifest.format))
    console.out.print(facts)


def _some(title: str, entries: list[str], style: str) -> None:
    if entries:
        console.out.print(Text(f"{len(entries)} {title}", style=style))
        for entry in entries[:SHOWN]:
            console.out.print(Text(f"  {entry}"))
        if len(entries) > SHOWN:
            console.out.print(Text(f"  and {len(entries) - SHOWN} more"))


def _short(text: str, width: int = 72) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
