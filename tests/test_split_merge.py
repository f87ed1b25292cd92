"""What a merge says of parts that do not fit together, and what the merged cache notes of how they were made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.shared.errors import CacheCorrupt, CacheError, CacheStale
from k5cache.store.index import IndexRows, index_rows, read_index, with_index
from k5cache.store.manifest import lock, read_manifest, write_manifest
from k5cache.store.notes import LeftOut, Part, SourceNote, arguments_of
from k5cache.store.reader import no_items, open_cache
from k5cache.store.split import read_split, write_split
from k5cache.upkeep.merge import merge_caches
from k5train.data.mixture import Mixture, Source
from k5train.training.cautions import of_doubled, of_parts
from tests.cli import Cli
from tests.conftest import Once
from tests.split_parts import Seven, changed, paths_of, seven_in_parts


@pytest.fixture
def seven(once: Once, toy_model: Path) -> Seven:
    return seven_in_parts(once, toy_model)


def test_parts_whose_captions_other_versions_cleaned_are_cleaned_again_by_the_next_encode(seven, toy_model, tmp_path):
    manifest = read_manifest(seven.parts[0])
    created = {**manifest.created_by, "ftfy": "6.0", "torch": "2.0"}
    left_out = replace(manifest.left_out, failed={"0" * 32: "is broken"}, decoders="pillow 1")
    other = changed(
        seven.parts[0], tmp_path / "other", recipe={**manifest.recipe, "cleaning": "0" * 16}, created_by=created,
        left_out=left_out,
    )  # fmt: skip
    merge_caches([other, *seven.parts[1:]], tmp_path / "merged")
    merged = read_manifest(tmp_path / "merged")
    assert merged.recipe == {key: value for key, value in manifest.recipe.items() if key != "cleaning"}
    assert merged.created_by["torch"] == f"2.0 and {manifest.created_by['torch']}"
    assert merged.created_by["python"] == manifest.created_by["python"]
    decoders = {read_manifest(root).left_out.decoders for root in seven.parts[1:]} - {""}
    assert merged.left_out.decoders == " and ".join(sorted({"pillow 1", *decoders}))
    options = ("--set", "cache.flip=true", "--set", "cache.wildcards=true", "--set", "cache.resolution=64")
    done = Cli(tmp_path)(app, "encode", str(seven.source), "-o", "merged", "--model", str(toy_model), *options)
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "merged").recipe["cleaning"] == manifest.recipe["cleaning"]
    assert [shard.file for shard in read_manifest(tmp_path / "merged").shards] == [s.file for s in merged.shards]


def test_a_merge_says_that_parts_saw_other_captions_of_the_same_images(seven, tmp_path):
    other = changed(seven.parts[0], tmp_path / "other", source=SourceNote("0" * 32))
    parts = [other, *seven.parts[1:]]
    assert not merge_caches(parts, tmp_path / "merged").has_one_state
    assert merge_caches(seven.parts, tmp_path / "same").has_one_state
    assert read_manifest(tmp_path / "merged").source == SourceNote()  # the next encode looks at all of it
    done = Cli(tmp_path)(app, "merge", *map(str, parts), "-o", "again")
    assert (done.code, "but other captions, masks or times" in done.out) == (0, True), done.out
    assert "k5cache encode SOURCE -o again" in done.out


def test_an_image_that_changed_between_two_parts_is_named_with_what_to_do(seven, tmp_path):
    first, second = seven.parts[0], tmp_path / "second"
    shutil.copytree(seven.parts[1], second)
    manifest, path = read_manifest(second), min(paths_of([first])[0])
    assert manifest.index
    rows = list(index_rows(read_index(second, manifest.index, manifest.format)))
    with lock(second):
        renamed = IndexRows.of([replace(row, path=path) for row in rows[:1]], manifest.format)
        write_manifest(second, with_index(second, manifest, renamed))
    with pytest.raises(CacheError) as caught:
        merge_caches([first, second, seven.parts[2]], tmp_path / "merged")
    assert caught.value.problem == f"{path} is one item in {first} and another in {second}"
    assert "encode both again, which encodes only what is new" in caught.value.fix


def test_the_command_that_mends_a_part_names_the_part(seven, tmp_path):
    again = "k5cache encode SOURCE --part 1/3 -o"
    unfinished = changed(seven.parts[0], tmp_path / "unfinished", index=None, locations=None)
    with pytest.raises(CacheError) as caught:
        merge_caches([unfinished, *seven.parts[1:]], tmp_path / "merged")
    assert caught.value.fix == f"Finish it first: {again} {unfinished}"
    with pytest.raises(CacheError) as caught:
        open_cache(unfinished)
    assert f"{again} {unfinished}" in caught.value.fix
    damaged = Path(shutil.copytree(seven.parts[0], tmp_path / "damaged"))
    shard = damaged / read_manifest(damaged).shards[0].file
    shard.unlink()  # it is a copy, and other caches link to none of its bytes
    with pytest.raises(CacheCorrupt) as caught:
        merge_caches([damaged, *seven.parts[1:]], tmp_path / "merged")
    assert f"{again} {damaged} --repair" in caught.value.fix
    (damaged / "manifest.json").write_bytes(b"[" * 100_000)  # its part cannot be read either
    with pytest.raises(CacheError):
        open_cache(damaged)
    assert arguments_of(Part((1, 3), 8)) == ("--part", "I/8")
    assert arguments_of(None) == ()


def test_a_damaged_split_is_written_again_by_the_next_encode(seven, tmp_path):
    root = Path(shutil.copytree(seven.parts[0], tmp_path / "part"))
    manifest = read_manifest(root)
    assert manifest.split
    table = read_split(root, manifest.split)
    assert write_split(root, manifest, table) == manifest.split
    data = bytearray((root / manifest.split.file).read_bytes())
    data[len(data) // 2] ^= 1
    (root / manifest.split.file).write_bytes(data)
    written = write_split(root, manifest, table)
    assert written.file != manifest.split.file
    assert read_split(root, written).equals(table)


def test_what_a_part_lacks_is_said_where_it_is_shown_or_trained_on(seven, tmp_path):
    with lock(tmp_path / "empty"):
        manifest = replace(read_manifest(seven.parts[1]), shards=(), locations=None, left_out=LeftOut())
        manifest = replace(manifest, prompts={}, split=None, index=None)
        write_manifest(tmp_path / "empty", with_index(tmp_path / "empty", manifest, ()))
    done = Cli(tmp_path)(app, "show", "empty", "--device", "cpu")
    assert (done.code, "empty holds no images: part 2 of 3 has none" in done.err) == (2, True), done.err
    assert no_items(open_cache(seven.whole)).fix == "Encode some first: k5cache encode SOURCE"
    opened = [Source(open_cache(root)) for root in seven.parts]
    assert [line.partition(" of its")[0] for line in of_parts(Mixture(opened[:2]))] == [
        f"{seven.parts[0]} holds only part 1 of 3", f"{seven.parts[1]} holds only part 2 of 3",
    ]  # fmt: skip
    assert of_parts(Mixture(opened)) == of_parts(Mixture([Source(open_cache(seven.whole))])) == []


def test_a_run_says_which_cache_is_named_several_times_also_by_a_link(seven, tmp_path):
    (tmp_path / "link").symlink_to(seven.whole)
    opened = [Source(open_cache(root)) for root in (seven.whole, seven.parts[0], tmp_path / "link")]
    assert of_doubled(Mixture(opened)) == [
        f"{seven.whole} is named 2 times, so each of its images is in an epoch 2 times as often. Name it once, or with"
        " `repeats` if that is wanted"
    ]
    assert of_doubled(Mixture(opened[:2])) == []


def test_a_cache_of_an_earlier_version_is_told_from_one_of_another_model(seven, tmp_path):
    roots = [Path(shutil.copytree(root, tmp_path / root.name)) for root in seven.parts[:2]]

    def refusal(change) -> CacheStale:
        manifest = read_manifest(seven.parts[0])
        recipe = json.loads(json.dumps(manifest.recipe))
        created = dict(manifest.created_by)
        change(recipe, created)
        with lock(roots[0]):
            write_manifest(roots[0], replace(manifest, recipe=recipe, created_by=created))
        with pytest.raises(CacheStale) as caught:
            merge_caches(roots, tmp_path / "merged")
        return caught.value

    error = refusal(lambda recipe, created: recipe["text"].update(text_encoder="0" * 32))
    assert "text.text_encoder has other weights (00000000 in" in error.problem
    assert "of an early version, whose fingerprint covers weights that are not used" in error.fix
    error = refusal(lambda recipe, created: recipe["selection"].pop("crop"))
    assert (
        f"{roots[0]} is of an earlier version, which did not note this. Bring it up to date: k5cache encode SOURCE "
        f"--part 1/3 -o {roots[0]} --update" in error.fix
    )
    error = refusal(
        lambda recipe, created: (recipe["text"].update(prompt_template="promt"), created.update(diffusers="0.40.0"))
    )
    assert f"({roots[0]} was made with diffusers 0.40.0; {roots[1]} with diffusers " in error.problem
