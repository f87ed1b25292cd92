"""The store: what is written is what is read, by us and by anyone with Parquet."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import k5cache
from k5cache.shared.errors import CacheError
from k5cache.store import locations, reader
from k5cache.store.index import index_rows, read_index, with_index
from k5cache.store.manifest import Manifest, read_manifest, write_manifest
from k5cache.store.shards import Shard, ShardWriter, verify_shard
from k5cache.store.tensors import TensorSpec, from_bytes, to_bytes
from tests.store_samples import CAPTIONS, LATENTS, TEXT, index_row, latents_row, make_cache, text_row


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_reads_well(cache: reader.Cache) -> None:
    for number in range(4):
        for name in ("mean", "std"):
            assert_same(cache.latents(f"l-{number}")[name], latents_row(number)[name])
    for key in CAPTIONS:
        text, written = cache.text(key), text_row(key)
        assert (text.key, text.n_tokens, text.caption) == (key, written["n_tokens"], written["caption"])
        assert_same(text.prompt_embeds, written["prompt_embeds"])
        assert_same(text.pooled, written["pooled"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
def test_a_tensor_comes_back_from_its_bytes_bit_for_bit(dtype: str) -> None:
    bits = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = bits.view(getattr(torch, dtype))  # every bit pattern, NaN payloads too
    restored = from_bytes(to_bytes(tensor.transpose(0, 1)), TensorSpec(dtype, (None, 3, tensor.shape[2])))
    assert restored.dtype == tensor.dtype
    assert torch.equal(restored.contiguous().view(torch.uint8), tensor.transpose(0, 1).contiguous().view(torch.uint8))


def test_bytes_are_little_endian_in_c_order() -> None:
    assert to_bytes(torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.bfloat16)) == bytes.fromhex("803f004080bf003f")


def test_a_writable_buffer_is_not_copied() -> None:
    buffer = bytearray(8)
    from_bytes(buffer, TensorSpec("float32", (2,)))[1] = 1.0
    assert buffer.hex() == "000000000000803f"


@pytest.mark.parametrize("num_bytes", [0, 1, 23, 25, 47])
def test_a_byte_count_that_the_shape_does_not_allow_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match="bytes are not a bfloat16 tensor"):
        from_bytes(bytes(num_bytes), TensorSpec("bfloat16", (None, 12)))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("int64", (2,)), ("float16", (1 << 20, 1 << 20)), ("uint8", (0,)), ("uint8", (-1, -5)), ("uint8", (None, None)),
     ("uint8", (True,)), ("uint8", (1,) * 9)],
)  # fmt: skip
def test_an_absurd_tensor_cannot_even_be_described(dtype: str, shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"dtype|shape|MiB"):
        TensorSpec(dtype, shape)


def test_a_cache_reads_back_what_was_written(tmp_path: Path) -> None:
    make_cache(tmp_path)
    assert_reads_well(reader.open_cache(tmp_path))


def test_an_item_is_a_dict_of_tensors_and_what_is_known_of_its_image(tmp_path: Path) -> None:
    make_cache(tmp_path)
    cache = k5cache.open(str(tmp_path))
    item = cache[-1]
    assert len(cache) == 4
    assert sorted(item) == ["bucket", "captions", "empty", "mask", "mean", "path", "row", "source", "std"]
    assert item["mask"] is None
    assert (item["path"], item["bucket"]) == ("sub/é 3.png", (64, 64))
    assert [caption.caption for caption in item["captions"]] == ["a dög\nruns", "a cat"]
    assert item["row"] == replace(index_row(3, ("t-dog", "t-cat")), caption_lengths=(7, 3))
    assert [each["path"][-5] for each in cache] == ["0", "1", "2", "3"]
    with pytest.raises(IndexError, match="item 4 of 4"):
        cache[4]


def test_tensors_of_a_row_may_be_changed_in_place_without_changing_the_cache(tmp_path: Path) -> None:
    make_cache(tmp_path)
    cache = reader.open_cache(tmp_path)
    cache[0]["mean"].zero_()
    assert_same(cache[0]["mean"], latents_row(0)["mean"])


def test_a_caption_is_read_without_its_embeddings(tmp_path: Path) -> None:
    make_cache(tmp_path)
    cache = reader.open_cache(tmp_path)
    assert [cache.caption(key) for key in CAPTIONS] == [caption for caption, _ in CAPTIONS.values()]
    with pytest.raises(CacheError, match="no text row with key 'l-0'"):
        cache.caption("l-0")


def test_prompts_are_found_as_their_user_wrote_them(tmp_path: Path) -> None:
    make_cache(tmp_path)
    cache = reader.open_cache(tmp_path)
    assert (cache.prompt("").n_tokens, cache.prompt(" A  cat").caption) == (1, "a cat")
    with pytest.raises(CacheError, match="does not hold the prompt 'a cat'") as caught:
        cache.prompt("a cat")
    assert caught.value.fix == f"Add it: k5cache prompts add {tmp_path} 'a cat'"


def test_caption_lengths_are_known_without_reading_a_shard(tmp_path: Path) -> None:
    make_cache(tmp_path)
    for shard in (*tmp_path.glob("text/*"), *tmp_path.glob("latents/*")):
        shard.unlink()
    cache = reader.open_cache(tmp_path)
    texts = cache.texts()
    assert (texts.keys.to_pylist(), texts.n_tokens.tolist()) == (["t-cat", "t-dog", "t-empty"], [3, 7, 1])
    assert cache.columns("caption_lengths").to_pydict() == {"caption_lengths": [[3], [3], [3], [7, 3]]}


def test_a_cache_without_a_locations_file_opens_by_reading_the_footers(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(make_cache(tmp_path), locations=None))
    assert not list(tmp_path.glob("locations-*"))
    assert_reads_well(reader.open_cache(tmp_path))


def test_a_second_index_reads_no_footer_that_the_first_has_read(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    gone = manifest.shards[0].file
    (tmp_path / gone).unlink()
    smaller = replace(manifest, shards=manifest.shards[::-1][:2])  # text first, rows 3 and 1
    for path in tmp_path.glob("*/*.parquet"):
        path.rename(path.with_suffix(".away"))
    again = with_index(tmp_path, smaller, [index_row(3), index_row(1)])
    for path in tmp_path.glob("*/*.away"):
        path.rename(path.with_suffix(".parquet"))
    write_manifest(tmp_path, again)
    assert again.index is not None
    assert again.index.file == "index-000001.parquet"
    cache = reader.open_cache(tmp_path)
    assert_same(cache[1]["mean"], latents_row(1)["mean"])
    assert cache.text("t-dog").n_tokens == 7
    with pytest.raises(CacheError, match="no latents row with key 'l-0'"):
        cache.latents("l-0")
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == ["index-000001.parquet", "locations-000001.parquet"]


def test_an_index_that_names_a_row_no_shard_holds_is_not_written(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    with pytest.raises(KeyError, match="l-9"):
        with_index(tmp_path, manifest, [index_row(9)])
    with pytest.raises(KeyError, match="t-cow"):
        with_index(tmp_path, manifest, [index_row(0, ("t-cow",))])


def test_the_index_keeps_every_field_of_every_row(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    assert manifest.index is not None
    rows = index_rows(read_index(tmp_path, manifest.index, 1))
    assert [replace(row, caption_lengths=()) for row in rows[:3]] == [index_row(0), index_row(1), index_row(2)]


def test_keys_of_latents_and_text_may_be_the_same(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "latents", LATENTS, (64, 64)) as writer:
        writer.append(latents_row(0) | {"key": "same"})
        latents = writer.finish()
    with ShardWriter(tmp_path, "text", TEXT) as writer:
        writer.append(text_row("t-cat") | {"key": "same"})
        text = writer.finish()
    table = locations.Locations(tmp_path, None, [text, latents])
    assert (table.find("latents", "same"), table.find("text", "same")) == ((latents, 0), (text, 0))


def test_bisection_finds_every_one_of_many_keys_and_no_other(tmp_path: Path) -> None:
    keys = [f"{random.Random(i).getrandbits(64):016x}" for i in range(200)]
    spec = {"mean": TensorSpec("uint8", (1,))}
    with ShardWriter(tmp_path, "latents", spec, (8, 8)) as writer:
        for key in keys:
            writer.append({"key": key, "mean": torch.zeros(1, dtype=torch.uint8)})
        shard = writer.finish()
    info, _ = locations.write_locations(tmp_path, [shard], 0)
    table = locations.Locations(tmp_path, info, [shard])
    assert [table.find("latents", key) for key in keys] == [(shard, row) for row in range(200)]
    assert [table.find("latents", key) for key in ("", "0", "g", keys[0][:-1], keys[0] + "0")] == [None] * 5
    assert table.find("text", keys[0]) is None


def test_the_reader_agrees_with_pyarrow_reading_the_same_shard_with_page_checksums(tmp_path: Path) -> None:
    text = make_cache(tmp_path).shards[2]
    table = pq.read_table(tmp_path / text.file, page_checksum_verification=True)
    assert table.schema.names == ["key", "prompt_embeds", "pooled", "n_tokens", "caption"]
    assert json.loads(table.schema.metadata[b"k5cache"])["tensors"][0] == {
        "name": "prompt_embeds", "dtype": "bfloat16", "shape": [None, 12]
    }  # fmt: skip
    for row in table.to_pylist():
        written = text_row(row["key"])
        assert from_bytes(row["prompt_embeds"], TEXT["prompt_embeds"]).equal(written["prompt_embeds"])
        assert from_bytes(row["pooled"], TEXT["pooled"]).equal(written["pooled"])
        assert (row["n_tokens"], row["caption"]) == (written["n_tokens"], written["caption"])
    meta = pq.read_metadata(tmp_path / text.file)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [1, 1, 1]


def test_huggingface_datasets_opens_the_shards(tmp_path: Path) -> None:
    from datasets import Dataset

    make_cache(tmp_path)
    files = [str(path) for path in sorted(tmp_path.glob("latents/*.parquet"))]
    rows = Dataset.from_parquet(files, cache_dir=str(tmp_path / "hf"))
    assert sorted(rows["key"]) == ["l-0", "l-1", "l-2", "l-3"]


def test_duckdb_opens_the_shards_and_the_index_and_joins_them(tmp_path: Path) -> None:
    import duckdb

    make_cache(tmp_path)
    joined = duckdb.sql(
        f"SELECT path, octet_length(mean), octet_length(std) FROM '{tmp_path}/index-*.parquet' "
        f"JOIN '{tmp_path}/latents/*.parquet' ON key = latent_key ORDER BY path"
    ).fetchall()
    assert joined == [(f"sub/é {number}.png", 2048, 2048) for number in range(4)]
    captions = duckdb.sql(f"SELECT caption, n_tokens FROM '{tmp_path}/text/*.parquet' ORDER BY n_tokens").fetchall()
    assert captions == [("", 1), ("a cat", 3), ("a dög\nruns", 7)]


def test_a_shard_is_named_by_its_content_and_what_the_manifest_says_of_it_is_true(tmp_path: Path) -> None:
    import hashlib

    shard = make_cache(tmp_path).shards[0]
    raw = (tmp_path / shard.file).read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    footer = raw[-8 - int.from_bytes(raw[-8:-4], "little") :]
    assert shard.file == f"latents/64x64-{digest[:16]}.parquet"
    assert (shard.sha256, shard.num_bytes, shard.num_rows) == (digest, len(raw), 2)
    assert shard.footer_sha256 == hashlib.sha256(footer).hexdigest()
    assert Shard(tmp_path, shard).keys == ["l-2", "l-0"]
    assert verify_shard(tmp_path, shard) == []


def test_a_row_costs_little_more_than_its_tensors(tmp_path: Path) -> None:
    spec = {name: TensorSpec("float16", (128, 128, 16)) for name in ("mean", "std")}  # 1024x1024 pixels
    zeros = torch.zeros(128, 128, 16, dtype=torch.float16)
    with ShardWriter(tmp_path, "latents", spec, (1024, 1024)) as writer:
        for i in range(2):
            writer.append({"key": f"{i:032x}", "mean": zeros, "std": zeros})
        shard = writer.finish()
    assert shard.num_bytes < 1.02 * 2 * 2 * zeros.numel() * 2


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(8, 8, 16), torch.zeros(8, 16, 8).half(), torch.zeros(1, 8, 8, 16).half()],
)
def test_a_tensor_that_is_not_as_described_is_not_written(tmp_path: Path, wrong: torch.Tensor) -> None:
    with ShardWriter(tmp_path, "latents", LATENTS, (64, 64)) as writer, pytest.raises(ValueError, match="mean is"):
        writer.append(latents_row(0) | {"mean": wrong})


def test_a_writer_that_is_left_by_an_error_leaves_nothing(tmp_path: Path) -> None:
    def encode() -> None:
        with ShardWriter(tmp_path, "text", TEXT) as writer:
            writer.append(text_row("t-cat"))
            assert len(list(tmp_path.glob("text/.tmp-*"))) == 1
            raise RuntimeError("the GPU fell off")

    with pytest.raises(RuntimeError, match="the GPU fell off"):
        encode()
    assert list(tmp_path.glob("text/*")) == []


def test_a_shard_without_rows_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "text", TEXT) as writer, pytest.raises(ValueError, match="at least one row"):
        writer.finish()
    assert list(tmp_path.glob("text/*")) == []


def test_threads_read_random_rows_through_fewer_open_shards_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "OPEN_SHARDS", 1)
    make_cache(tmp_path)
    cache = reader.open_cache(tmp_path)
    wanted = [latents_row(number)["mean"] for number in range(4)]

    def read(seed: int) -> int:
        numbers = random.Random(seed).choices(range(4), k=60)
        return sum(cache[n]["mean"].equal(wanted[n]) for n in numbers)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [60] * 4


def test_an_open_cache_outlives_the_encode_that_replaces_its_index(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    cache = reader.open_cache(tmp_path)
    write_manifest(tmp_path, with_index(tmp_path, manifest, [index_row(1)]))
    assert len(list(cache)) == 4
    assert len(reader.open_cache(tmp_path)) == 1


def test_a_reader_that_met_a_replaced_index_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_cache(tmp_path)
    write_manifest(tmp_path, with_index(tmp_path, manifest, [index_row(1)]))  # removes the first index
    answers = iter([manifest])  # what was read just before
    monkeypatch.setattr(reader, "read_manifest", lambda root: next(answers, None) or read_manifest(root))
    assert len(reader.open_cache(tmp_path)) == 1


def test_the_manifest_reads_back_as_written(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    assert read_manifest(tmp_path) == manifest
    empty = Manifest(recipe={"float": 0.1, "none": None, "words": 'é"\n\u2028', "list": [1, [2]]})
    write_manifest(tmp_path, empty)
    assert read_manifest(tmp_path) == empty


def test_an_interrupted_encode_is_told_apart_from_a_broken_cache(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(make_cache(tmp_path), index=None))
    with pytest.raises(CacheError, match="was interrupted"):
        reader.open_cache(tmp_path)


def test_importing_k5cache_and_the_store_is_light() -> None:
    probe = (
        "import sys, k5cache; assert not {'pyarrow', 'torch', 'numpy'} & set(sys.modules);"
        "import k5cache.store.reader; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_arrow_stores_what_the_reader_relies_on(tmp_path: Path) -> None:
    shard = make_cache(tmp_path).shards[0]
    meta = pq.read_metadata(tmp_path / shard.file)
    raw = (tmp_path / shard.file).read_bytes()
    for i in range(meta.num_row_groups):
        for j in range(meta.num_columns):
            chunk = meta.row_group(i).column(j)
            end = chunk.data_page_offset + chunk.total_compressed_size
            value = pq.ParquetFile(tmp_path / shard.file).read_row_group(i).column(j)[0].as_py()
            value = value.encode() if isinstance(value, str) else value
            assert set(chunk.encodings) == {"PLAIN", "RLE"}
            assert raw[end - len(value) - 4 : end] == len(value).to_bytes(4, "little") + value
    assert pa.types.is_binary(meta.schema.to_arrow_schema().field("mean").type)


def test_what_is_no_cache_is_answered_with_a_command_that_works(tmp_path):
    for name in ("photos/a.png", "run/run.json", "run/recipe.toml", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    for name, fix in (
        ("photos", f"If these are images to train on, encode them first: k5cache encode {tmp_path / 'photos'}"),
        ("run", "Give a folder made by `k5cache encode`"),
        ("file", "Give a folder made by `k5cache encode`"),
        ("empty", f"Make one: k5cache encode SOURCE -o {tmp_path / 'empty'}"),
        ("new", f"Make one: k5cache encode SOURCE -o {tmp_path / 'new'}"),
    ):
        with pytest.raises(CacheError) as error:
            read_manifest(tmp_path / name)
        assert error.value.fix == fix
