"""Is an image encoded once and the same from any kind of source, and is each of its captions trained on?"""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import k5cache
from k5cache.cli import app
from tests import table_files
from tests.cli import Cli, Done


def encode(cli: Cli, model: Path, source: str, *options: str) -> Done:
    shape = ["--model", str(model), "--set", "cache.resolution=64", "-o", "cache/all"]
    done = cli(app, "encode", source, *shape, *(part for option in options for part in ("--set", option)))
    assert done.code == 0, done.err
    return done


def keys(cli: Cli) -> list[tuple[str, str, tuple[str, ...]]]:
    """(file name, latent key, captions) of every item, by name."""
    cache = k5cache.open(cli.folder / "cache" / "all")
    said = [tuple(caption.caption for caption in item["captions"]) for item in cache]
    return [(cache.row(i).path, cache.row(i).latent_key, said[i]) for i in range(len(cache))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_model) -> Cli:
    """Three images of different shapes, each with two captions, encoded from a folder."""
    cli = Cli(tmp_path_factory.mktemp("sources"))
    (cli.folder / "set").mkdir()
    for i, size in enumerate([(96, 80), (64, 64), (60, 120)]):
        rows = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(rows).save(cli.folder / "set" / f"{i}.png")
        (cli.folder / "set" / f"{i}.txt").write_text(f"number {i}\nthe same, said otherwise")
    encode(cli, toy_model, "set")
    return cli


def contents(cli: Cli) -> list[bytes]:
    return [(cli.folder / "set" / f"{i}.png").read_bytes() for i in range(3)]


def write_parquet(cli: Cli, images: list[bytes]) -> None:
    import datasets

    said = [[f"number {i}", "the same, said otherwise"] for i in range(len(images))]
    table = datasets.Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in images], "text": said})
    table.cast_column("image", datasets.Image()).to_parquet(cli.folder / "t.parquet")


def test_an_image_is_encoded_once_whether_it_comes_as_a_file_in_a_table_or_in_a_tar(place, toy_model):
    from_folder = keys(place)
    latents = {path.name for path in (place.folder / "cache/all/latents").iterdir()}
    write_parquet(place, contents(place))
    with tarfile.open(place.folder / "t.tar", "w") as tar:
        for i, content in enumerate(contents(place)):
            for suffix, data in (("png", content), ("txt", f"number {i}\nthe same, said otherwise".encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    lines = [f'{{"path": "set/{i}.png", "text": ["number {i}", "the same, said otherwise"]}}' for i in range(3)]
    (place.folder / "t.jsonl").write_text("\n".join(lines))
    for source, names in (
        ("t.parquet", [f"t.parquet#{i}" for i in range(3)]),
        ("t.tar", [f"t.tar/{i}.png" for i in range(3)]),
        ("t.jsonl", [f"set/{i}.png" for i in range(3)]),
    ):
        encode(place, toy_model, source)
        assert [(latent, said) for _, latent, said in keys(place)] == [
            (latent, said) for _, latent, said in from_folder
        ]
        assert [path for path, _, _ in keys(place)] == names
        assert {path.name for path in (place.folder / "cache/all/latents").iterdir()} == latents
        assert "is up to date: 3 items" in encode(place, toy_model, source).out


def test_a_new_row_of_a_table_is_encoded_alone_and_a_broken_one_is_skipped(place, toy_model):
    write_parquet(place, contents(place))
    encode(place, toy_model, "t.parquet")
    latents = {path.name for path in (place.folder / "cache/all/latents").iterdir()}
    fourth = io.BytesIO()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(fourth, "PNG")
    write_parquet(place, [*contents(place), fourth.getvalue(), b"not an image"])
    out = encode(place, toy_model, "t.parquet").out
    assert "t.parquet#4: is not an image, or is of a kind that is not supported" in out
    [new] = {path.name for path in (place.folder / "cache/all/latents").iterdir()} - latents
    cache = k5cache.open(place.folder / "cache" / "all")
    assert {shard.num_rows for shard in cache.manifest.shards if new in shard.file} == {1}
    assert [path for path, _, _ in keys(place)] == [f"t.parquet#{i}" for i in range(4)]


@pytest.mark.parametrize("kind", ["tar", "csv"])
def test_a_table_with_other_content_and_the_same_size_and_time_is_encoded_again(tmp_path, toy_model, kind):
    cli = Cli(tmp_path)
    source = tmp_path / f"t.{kind}"

    def write(shade: int, caption: str) -> None:
        image = io.BytesIO()
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(image, "BMP")
        if kind == "tar":
            table_files.tar(source, {"0.bmp": image.getvalue(), "0.txt": caption})
        else:
            (tmp_path / "0.bmp").write_bytes(image.getvalue())
            source.write_text(f"image,text\n0.bmp,{caption}\n")
        for file in (source, tmp_path / "0.bmp"):
            if file.exists():
                os.utime(file, ns=(1, 10**18))

    write(10, "one")
    size = source.stat().st_size
    for options in ([], ["--rehash"]):
        shape = ["--model", str(toy_model), "--set", "cache.resolution=64", "-o", "cache/all"]
        assert cli(app, "encode", str(source), *shape, *options).code == 0
    [(_, before, said)] = keys(cli)
    assert said == ("one",)
    time.sleep(0.02)  # more than a tick of the file system's clock
    write(20, "two")
    assert source.stat().st_size == size
    encode(cli, toy_model, str(source))
    [(_, after, said)] = keys(cli)
    assert (after != before, said) == (True, ("two",))


def test_the_trainer_draws_every_caption_of_an_image(place):
    from k5train.data.loader import Loader
    from k5train.options.train import TrainConfig

    cache = k5cache.open(place.folder / "cache" / "all")
    drawn: list[str] = []
    text = cache.text
    cache.text = lambda key: drawn.append(key) or text(key)  # type: ignore[method-assign]
    assert [len(cache.row(i).caption_keys) for i in range(3)] == [2, 2, 2]
    loader = Loader(cache, TrainConfig(batch_size=1, caption_dropout_probability=0.0), 1.0)
    for micro in range(40):
        loader.batch(micro)
    assert set(drawn) == {key for i in range(len(cache)) for key in cache.row(i).caption_keys}


def test_a_metadata_file_and_a_trigger_change_the_captions_alone(place, toy_model):
    before = {latent for _, latent, _ in keys(place)}
    (place.folder / "set" / "metadata.csv").write_text("file_name,text\n0.png,one\n1.png,two\n2.png,three\n")
    shape = ["--model", str(toy_model), "--set", "cache.resolution=64", "-o", "cache/all"]
    options = ["--set", "cache.caption_strategy=metadata", "--set", "cache.trigger=sks"]
    refused = place(app, "encode", "set", *shape, *options)
    assert refused.code == 2
    assert "selection.caption_strategy is 'textfile' in the cache, 'metadata' now" in refused.err
    assert "selection.trigger is not set in the cache, 'sks' now" in refused.err
    assert place(app, "encode", "set", *shape, *options, "--update").code == 0
    assert [(path, said) for path, _, said in keys(place)] == [
        ("0.png", ("sks, one",)), ("1.png", ("sks, two",)), ("2.png", ("sks, three",))
    ]  # fmt: skip
    assert {latent for _, latent, _ in keys(place)} <= before


@pytest.mark.parametrize(
    ("source", "said"),
    [("bad.csv", "bad.csv line 2 has 3 cells, the header has 2"), ("me/none", "no file or folder me/none")],
)
def test_a_source_that_cannot_be_used_ends_in_two_lines_before_a_cache_is_made(place, toy_model, source, said):
    (place.folder / "bad.csv").write_text("image,text\na.png,a cat, a dog\n")
    done = place(app, "encode", source, "--model", str(toy_model))
    lines = [line for line in done.err.splitlines() if line]
    assert (done.code, [line.split(":")[0].strip() for line in lines]) == (2, ["error", "fix"])
    assert said in lines[0]
    assert not (place.folder / "cache" / Path(source).stem).exists()
