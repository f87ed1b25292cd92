"""What is wrong with the rows of an index, given where rows are? In columns: a million rows take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.shared.kind import Kind
from k5cache.store import columns
from k5cache.store.index import IndexRow, IndexRows
from k5cache.store.locations import Locations, Texts
from k5cache.store.manifest import ShardKind

_WANTED: tuple[tuple[ShardKind, str, str], ...] = (
    ("latents", "latent_key", "latents"),
    ("masks", "mask_key", "masks"),
    ("latents", "source_key", "latents of its source"),
)
"""The kind of shard, the field of a row with its key, and how messages call it."""
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def problems_of_rows(rows: IndexRows, kind: Kind, locations: Locations, texts: Texts) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) in the order of the rows. Each of these rows becomes an object; sound ones do not."""
    size = columns.numbers(rows.column("bucket_width")), columns.numbers(rows.column("bucket_height"))
    lacking = {field: ~locations.in_bucket(of, rows.column(field), size) for of, field, _ in _WANTED}
    no_source = _are_null(rows.column("source_key")) if kind == "i2i" else np.zeros(len(rows), bool)
    empty = rows.column("empty_key")
    no_empty = ~_are_null(empty) & ~columns.flags(pc.is_in(empty, value_set=texts.keys))
    no_captions = ~_have_captions(rows, texts)
    is_wrong = np.logical_or.reduce([*lacking.values(), no_source, no_empty, no_captions])
    for i in np.flatnonzero(is_wrong).tolist():
        row: IndexRow = rows[i]
        for _, field, name in _WANTED:
            if lacking[field][i]:
                yield row.path, f"has no {name} of {row.bucket_width}x{row.bucket_height}"
        if no_source[i]:
            yield row.path, "has no source"
        if no_empty[i]:
            yield row.path, "has no empty instruction"
        if no_captions[i]:
            yield row.path, "has no captions of the lengths it says"


def _have_captions(rows: IndexRows, texts: Texts) -> Flags:
    """Whether a row has captions, all of them are there, and their lengths are those that the row says."""
    keys, lengths = rows.column("caption_keys"), rows.column("caption_lengths")
    count = columns.numbers(pc.list_value_length(keys))
    have = (count > 0) & (count == columns.numbers(pc.list_value_length(lengths)))
    chosen = pa.array(have)
    keys, lengths = keys.filter(chosen), lengths.filter(chosen)
    places = pc.index_in(keys.flatten(), value_set=texts.keys)
    stored = pc.take(pa.array(texts.n_tokens, pa.int32()), places)
    is_same = columns.flags(pc.equal(stored, lengths.flatten()).fill_null(False))
    owners = columns.numbers(pc.list_parent_indices(keys))
    have[np.flatnonzero(have)[owners[~is_same]]] = False
    return have


def _are_null(array: pa.Array) -> Flags:
    return columns.flags(array.is_null())
