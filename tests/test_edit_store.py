"""Caches for image-to-image on disk: format 2. Those for text-to-image are of format 1 as before, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

import k5cache
from k5cache.shared.errors import CacheError, ModelError
from k5cache.shared.kind import kind_of_model, kind_of_recipe
from k5cache.shared.model import FLAVOURS, ModelConfig
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import encode_document, read_manifest, write_manifest
from tests.edit_samples import EDIT, make_edit_cache, pair_row
from tests.store_samples import latents_row, make_cache

FORMAT_1 = [
    *("path", "content_hash", "num_bytes", "mtime_ns", "inode", "width", "height", "bucket_width", "bucket_height"),
    *("resized_width", "resized_height", "left", "top", "flipped", "latent_key", "caption_keys", "mask_key"),
    *("mask_hash", "mask_num_bytes", "mask_mtime_ns", "mask_inode", "caption_lengths", "captions_hash"),
]
"""The columns of an index of format 1, which readers of other programs rely on."""
FORMAT_2 = [
    *FORMAT_1,
    *("source_path", "source_hash", "source_num_bytes", "source_mtime_ns", "source_inode", "source_width"),
    *("source_height", "source_key", "empty_key"),
]


def document_of(root):
    return json.loads((root / "manifest.json").read_bytes())


def test_a_cache_for_text_to_image_is_written_as_before(tmp_path):
    manifest = make_cache(tmp_path)
    document = document_of(tmp_path)
    assert document["format"] == 1
    assert sorted(document) == [
        *("created_by", "format", "index", "left_out", "locations", "prompts", "recipe", "sha256", "shards", "source"),
    ]
    index = pq.ParquetFile(tmp_path / manifest.index.file)
    assert index.schema_arrow.names == FORMAT_1
    assert index.metadata.metadata[b"k5cache.index"] == b'{"format": 1}'
    cache = k5cache.open(tmp_path)
    assert cache.kind == "t2i"
    assert (cache[0]["source"], cache[0]["empty"]) == (None, None)


def test_a_cache_for_image_to_image_gives_source_target_and_both_instructions(tmp_path):
    manifest = make_edit_cache(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert document_of(tmp_path)["format"] == 2
    table = read_index(tmp_path, manifest.index, 2)
    assert table.schema.names == FORMAT_2
    rows = index_rows(table)
    assert rows == [replace(pair_row(0), caption_lengths=(3,)), replace(pair_row(2, None), caption_lengths=(3,))]
    cache = k5cache.open(tmp_path)
    assert cache.kind == "i2i"
    assert [cache.row(i) for i in range(2)] == rows
    for item, number in zip(cache, (0, 2), strict=True):
        assert torch.equal(item["mean"], latents_row(number)["mean"])
        assert torch.equal(item["source"]["mean"], latents_row(number + 1)["mean"])
        assert torch.equal(item["source"]["std"], latents_row(number + 1)["std"])
    assert [item["empty"] and item["empty"].caption for item in cache] == ["", None]


def test_a_pair_to_draw_is_found_or_the_command_that_adds_it_is_named(tmp_path):
    make_edit_cache(tmp_path)
    cache = k5cache.open(tmp_path)
    assert cache.edit("9" * 32, "make it blue") == EDIT
    for wanted, source in ((("9" * 32, "make it red"), "a b.png"), (("8" * 32, "make it blue"), "c.png")):
        with pytest.raises(CacheError) as caught:
            cache.edit(*wanted, source)
        assert source in caught.value.problem
        shown = "'a b.png'" if " " in source else source
        assert caught.value.fix == f"Add it: k5cache prompts add {tmp_path} --source {shown} '{wanted[1]}'"
    with pytest.raises(CacheError) as caught:
        cache.prompt("")
    assert caught.value.fix.startswith(f"Add it: k5cache prompts add {tmp_path} --source PICTURE")


@pytest.mark.parametrize("missing", ["source_key", "empty_key"])
def test_an_index_that_names_what_no_shard_has_is_not_written(tmp_path, missing):
    with pytest.raises(KeyError, match="nowhere"):
        make_edit_cache(tmp_path, replace(pair_row(0), **{missing: "nowhere"}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 1}, "format is 1"),
        ({"format": 3}, "has cache format 3; this k5cache reads up to 2"),
        ({"edits": None}, "edits is None"),
        ({"edits": [1]}, "edit is 1"),
        ({"edits": [{"source": "a"}]}, "source_hash is None"),
        ({"edits": [{**vars(EDIT), "width": -1}]}, "width is -1"),
        ({"edits": [{**vars(EDIT), "empty_key": 1}]}, "empty_key is 1"),
        ({"recipe": {"text": {"pipeline": "i2v"}}}, "recipe.text.pipeline is 'i2v'"),
        ({"recipe": {"text": {}}}, "format is 2"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, changes, problem):
    make_edit_cache(tmp_path)
    document = document_of(tmp_path)
    del document["sha256"]
    (tmp_path / "manifest.json").write_bytes(encode_document(document | changes))
    with pytest.raises(CacheError) as caught:
        k5cache.open(tmp_path)
    assert problem in caught.value.problem


def test_a_cache_keeps_its_format_when_its_manifest_is_written_again(tmp_path):
    for name, make, format in (("t2i", make_cache, 1), ("i2i", make_edit_cache, 2)):
        root = tmp_path / name
        write_manifest(root, replace(make(root), created_by={"x": "1"}))
        assert (document_of(root)["format"], read_manifest(root).created_by) == (format, {"x": "1"})


def test_the_transformer_says_what_a_model_is_and_the_flavour_only_if_there_is_none(tmp_path):
    def kind(visual_cond: bool | None, **model: str) -> str:
        folder = tmp_path / str(visual_cond)
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        if visual_cond is not None:
            (folder / "transformer" / "config.json").write_text(json.dumps({"visual_cond": visual_cond}))
        return kind_of_model(ModelConfig(**model), folder)

    assert kind(None) == kind(False) == kind(False, path="mine") == kind(None, path="mine") == "t2i"
    assert kind(True, path="mine") == kind(None, flavour="i2i-lite-sft") == "i2i"
    assert kind(True, flavour="i2i-lite-pretrain") == kind(True, path="mine", flavour="i2i-lite-sft") == "i2i"
    assert kind(None, path=FLAVOURS["i2i-lite-sft"]) == "i2i"
    for visual_cond, model, fix in (
        (False, {"path": "mine", "flavour": "i2i-lite-sft"}, '"t2i-lite-sft"'),
        (True, {"path": "mine", "flavour": "t2i-lite-pretrain"}, '"i2i-lite-pretrain"'),
        (True, {}, '"i2i-lite-sft"'),
    ):
        with pytest.raises(ModelError) as caught:
            kind(visual_cond, **model)
        assert fix in caught.value.fix


def test_a_recipe_without_a_pipeline_is_for_text_to_image():
    assert [kind_of_recipe(r) for r in ({}, {"text": {}}, {"text": {"pipeline": "i2i"}})] == ["t2i", "t2i", "i2i"]
