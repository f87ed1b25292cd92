"""A small cache for image-to-image to try the store on: two pairs, two instructions, one pair to draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Edit, Manifest, lock, write_manifest
from k5cache.store.shards import ShardWriter
from tests.store_samples import LATENTS, TEXT, index_row, latents_row, text_row

RECIPE = {"text": {"pipeline": "i2i"}}
EDIT = Edit("to draw/é.png", "9" * 32, "make it blue", "t-dog", "t-empty", "l-3", 64, 64)


def pair_row(number: int, empty_key: str | None = "t-empty") -> IndexRow:
    """Target ``l-<number>``, source ``l-<number + 1>``."""
    return replace(
        index_row(number),
        source_path=f"sub/é {number}.jpg",
        source_hash=f"{number + 1}" * 32,
        source_num_bytes=456,
        source_mtime_ns=1_700_000_000_000_000_003,
        source_inode=2**63 + 10 + number,
        source_width=90,
        source_height=80,
        source_key=f"l-{number + 1}",
        empty_key=empty_key,
    )


def make_edit_cache(root: Path, *rows: IndexRow) -> Manifest:
    """Items 0 and 2, or ``rows``; latents 0 to 3."""
    with lock(root):
        with ShardWriter(root, "latents", LATENTS, (64, 64)) as writer:
            for number in range(4):
                writer.append(latents_row(number))
            latents = writer.finish()
        with ShardWriter(root, "text", TEXT) as writer:
            for key in ("t-cat", "t-dog", "t-empty"):
                writer.append(text_row(key))
            texts = writer.finish()
        manifest = Manifest(recipe=RECIPE, shards=(latents, texts), edits=(EDIT,))
        manifest = with_index(root, manifest, rows or [pair_row(0), pair_row(2, None)])
        write_manifest(root, manifest)
    return manifest
