"""Is FORMAT.md enough? A reader written from its text alone, without k5cache and torch, reads what k5cache reads."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

import k5cache
from tests.edit_samples import make_edit_cache
from tests.store_samples import make_cache

NUMPY = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "uint8": "u1"}


def read(root: Path) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, np.ndarray]]]]:
    """Yield each item's index row, latents and captions, then, if it has them, the empty instruction and the source's
    latents. Rows are found by the footers, without ``locations``."""
    manifest = read_manifest(root)
    shards, where = {}, {}
    for info in manifest["shards"]:
        shards[info["file"]] = shard = open_shard(root, info)
        for number, key in enumerate(shard["rows"]["key"]):
            where.setdefault((info["kind"], key), (info["file"], number))
    for item in read_table(root, manifest["index"]):
        source = [("latents", item["source_key"])] if manifest["format"] == 2 else []
        empty = [("text", item["empty_key"])] if source and item["empty_key"] else []
        latents, *captions = (
            read_row(shards[file], number)
            for file, number in [
                where["latents", item["latent_key"]],
                *(where["text", key] for key in item["caption_keys"]),
                *(where[key] for key in (*empty, *source)),
            ]
        )
        yield item, latents, captions


def read_manifest(root: Path) -> dict[str, Any]:
    raw = (root / "manifest.json").read_bytes()
    assert raw.startswith(b'{\n "sha256": "')
    assert hashlib.sha256(raw[:14] + b"0" * 64 + raw[78:]).hexdigest().encode() == raw[14:78]
    manifest = json.loads(raw)
    is_i2i = manifest["recipe"]["text"].get("pipeline") == "i2i"
    assert manifest["format"] == (2 if is_i2i else 1)
    return manifest


def read_table(root: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    data = (root / info["file"]).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (info["num_bytes"], info["sha256"])
    return pq.read_table(root / info["file"]).to_pylist()


def open_shard(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    data = (root / info["file"]).read_bytes()
    assert (len(data), data[:4]) == (info["num_bytes"], b"PAR1")
    (length,) = struct.unpack("<I", data[-8:-4])
    assert hashlib.sha256(data[-length - 8 :]).hexdigest() == info["footer_sha256"]
    footer = pq.read_metadata(root / info["file"])
    described, rows = (json.loads(footer.metadata[name]) for name in (b"k5cache", b"k5cache.rows"))
    assert (described["kind"], described["bucket"]) == (info["kind"], info["bucket"])
    assert footer.num_row_groups == info["num_rows"]
    return {"data": data, "footer": footer, "tensors": described["tensors"], "rows": rows}


def read_row(shard: dict[str, Any], number: int) -> dict[str, np.ndarray]:
    data, group, tensors = shard["data"], shard["footer"].row_group(number), {}
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    ends = {name: chunk.data_page_offset + chunk.total_compressed_size for name, chunk in chunks.items()}
    whole = data[min(chunk.data_page_offset for chunk in chunks.values()) : max(ends.values())]
    assert xxhash.xxh3_64_hexdigest(whole) == shard["rows"]["xxh3_64"][number]
    for tensor in shard["tensors"]:
        sizes = [shard["rows"]["n_tokens"][number] if size is None else size for size in tensor["shape"]]
        dtype = np.dtype(NUMPY[tensor["dtype"]])
        start = ends[tensor["name"]] - math.prod(sizes) * dtype.itemsize
        assert struct.unpack("<I", data[start - 4 : start]) == (ends[tensor["name"]] - start,)
        tensors[tensor["name"]] = np.frombuffer(data[start : ends[tensor["name"]]], dtype).reshape(sizes)
    return tensors


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the format page's reader gives it: numpy has no bfloat16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def test_it_reads_the_values_that_k5cache_reads(tmp_path):
    make_cache(tmp_path)
    cache = k5cache.open(tmp_path)
    items = list(read(tmp_path))
    assert len(items) == len(cache) == 4
    for ours, (item, latents, captions) in zip(cache, items, strict=True):
        assert item["path"] == ours["path"]
        assert all(np.array_equal(bits(ours[name]), latents[name]) for name in ("mean", "std"))
        for text, caption in zip(ours["captions"], captions, strict=True):
            assert np.array_equal(bits(text.prompt_embeds), caption["prompt_embeds"])
            assert np.array_equal(bits(text.pooled), caption["pooled"])


def test_it_reads_the_pairs_that_k5cache_reads(tmp_path):
    manifest = make_edit_cache(tmp_path)
    assert [edit["text_key"] for edit in read_manifest(tmp_path)["edits"]] == [manifest.edits[0].text_key]
    for ours, (item, _, rest) in zip(k5cache.open(tmp_path), read(tmp_path), strict=True):
        texts = [*ours["captions"], *([ours["empty"]] if item["empty_key"] else [])]
        *read_texts, source = rest
        assert [text.caption for text in texts] == (["a cat", ""] if item["empty_key"] else ["a cat"])
        for text, caption in zip(texts, read_texts, strict=True):
            assert np.array_equal(bits(text.prompt_embeds), caption["prompt_embeds"])
        assert all(np.array_equal(bits(ours["source"][name]), source[name]) for name in ("mean", "std"))


@pytest.mark.parametrize("kind", ["latents/*.parquet", "text/*.parquet", "index-*.parquet", "manifest.json"])
def test_what_the_page_says_to_check_finds_every_flipped_bit_but_those_of_rows_that_it_does_not_read(tmp_path, kind):
    manifest = make_cache(tmp_path)
    unread = {key for key in ("t-empty",) if key in manifest.prompts.values()}
    path = min(tmp_path.glob(kind))
    whole = path.read_bytes()
    skipped = [
        range(first.data_page_offset, last.data_page_offset + last.total_compressed_size)
        for first, last in _groups(path, unread)
    ]
    for at in random.Random(0).sample(range(len(whole)), 150):
        if any(at in span for span in skipped):
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises((AssertionError, OSError, ValueError)):
            list(read(tmp_path))
    path.write_bytes(whole)
    assert len(list(read(tmp_path))) == 4


def _groups(path: Path, keys: set[str]) -> list[tuple[Any, Any]]:
    """First and last column chunk of the rows with these keys."""
    if path.parent.name != "text":
        return []
    footer = pq.read_metadata(path)
    rows = json.loads(footer.metadata[b"k5cache.rows"])["key"]
    groups = [footer.row_group(number) for number, key in enumerate(rows) if key in keys]
    return [(group.column(0), group.column(group.num_columns - 1)) for group in groups]
