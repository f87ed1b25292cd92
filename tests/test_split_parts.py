"""Several processes encode a part each, and a merge makes of them what one process makes of the whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.commands.arguments import read_part
from k5cache.encode import shares
from k5cache.shared.errors import CacheError, CacheStale, K5Error
from k5cache.shared.model import WantedEdit
from k5cache.sources import images
from k5cache.store.manifest import read_manifest
from k5cache.store.notes import Part, SourceNote
from k5cache.store.reader import open_cache
from k5cache.store.split import SCHEMA
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.parts import Whole
from k5cache.upkeep.united import merge_source
from k5cache.upkeep.verify import verify_cache
from k5train.cli import app as train_app
from tests.cli import Cli
from tests.conftest import Once
from tests.split_parts import Seven, assert_same_rows, changed, encode_parts, paths_of, seven_in_parts
from tests.table_files import parquet, png, tar
from tests.workshop import EditShop, Workshop


@pytest.fixture
def seven(once: Once, toy_model: Path) -> Seven:
    return seven_in_parts(once, toy_model)


def test_merged_parts_hold_the_rows_of_one_encode_by_key_and_by_bytes(seven, tmp_path):
    roots, paths = seven.parts, paths_of(seven.parts)
    assert [read_manifest(root).part for root in roots] == [Part((n,), 3) for n in (1, 2, 3)]
    assert sum(map(len, paths)) == 7
    assert any({"a.png", "a copy.png"} <= of_part for of_part in paths)  # identical images stay together
    merge_caches(roots[::-1], tmp_path / "merged")
    assert_same_rows(tmp_path / "merged", seven.whole)
    manifest, of_whole = read_manifest(tmp_path / "merged"), read_manifest(seven.whole)
    assert (manifest.part, manifest.split) == (None, None)
    assert (tmp_path / "merged" / "skipped.csv").read_bytes() == (seven.whole / "skipped.csv").read_bytes()
    assert manifest.source.listing == of_whole.source.listing != ""  # so the next encode has nothing to do
    assert (manifest.recipe, manifest.created_by) == (of_whole.recipe, of_whole.created_by)
    notes = [
        replace(read_manifest(root), source=SourceNote("a", stats)) for root, stats in zip(roots, "bb", strict=False)
    ]
    assert merge_source(Whole(split=SCHEMA.empty_table()), [*notes, replace(notes[0], source=SourceNote("a"))]) == (
        SourceNote("a", "b")
    )


@pytest.fixture
def read(monkeypatch) -> dict[str, list[str]]:
    """Which images were sampled and which were read whole, by name."""
    names: dict[str, list[str]] = {"sampled": [], "whole": []}
    for module, function, kind in ((shares, "sample", "sampled"), (images, "examine", "whole")):
        original = getattr(module, function)

        def look(content, original=original, kind=kind):
            names[kind].append(content.name)
            return original(content)

        monkeypatch.setattr(module, function, look)
    return names


def test_a_part_reads_its_own_images_whole_and_of_others_a_sample_once_and_new_images_move_none(
    tmp_path, toy_model, read
):
    shop = Workshop(tmp_path / "shop", toy_model)
    names = {f"{i}.png" for i in range(6)}
    for i, name in enumerate(sorted(names)):
        shop.put(name, f"cat {i}", seed=i)
    roots = encode_parts(shop, 2)
    before = paths_of(roots)
    assert (sorted(read["sampled"]), sorted(read["whole"])) == (sorted([*names, *names]), sorted(names))
    read["sampled"].clear(), read["whole"].clear()
    encode_parts(shop, 2)
    assert read == {"sampled": [], "whole": []}
    files = {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}
    shop.put("0.png", "cat 0", seed=0)  # written again, with the same bytes
    shop.put("new.png", "a new cat", seed=9)
    _encode_one_after_the_other(shop, roots, tmp_path)
    assert (sorted(read["sampled"]), sorted(read["whole"])) == (
        ["0.png", "0.png", "new.png", "new.png"],
        ["0.png", "new.png"],
    )
    after = paths_of(roots)
    assert all(old <= new for old, new in zip(before, after, strict=True))
    assert set.union(*after) == names | {"new.png"}
    assert all(
        path.exists() and path.read_bytes() == data
        for path, data in files.items()
        if path.parent.name in ("text", "64x64")
    )
    merge_caches(roots, tmp_path / "later")
    shop.encode()
    assert_same_rows(tmp_path / "later", shop.root)
    for root in roots:
        assert (collect(root).dropped, verify_cache(root).problems, verify_cache(root).unnamed) == ((), (), ())


def _encode_one_after_the_other(shop: Workshop, roots: list[Path], tmp_path: Path) -> None:
    """Both parts of a source that has changed. They do not merge while only one has seen the change."""
    encode_parts(shop, 2, only=(2,))
    with pytest.raises(CacheStale) as caught:
        merge_caches(roots, tmp_path / "merged")
    assert caught.value.problem == (
        "The source has changed between the encodes of its parts: part 1 saw other images than part 2"
    )
    merge_caches(roots, tmp_path / "merged", is_incomplete=True)
    encode_parts(shop, 2, only=(1,))


def test_the_part_of_an_image_is_a_function_of_its_bytes_and_changes_with_any_sample(tmp_path):
    data = bytes(range(256)) * 1024
    path = tmp_path / "x"
    path.write_bytes(data)
    known = shares.sample(data)
    assert shares.sample(path) == known == 17179020476120996244
    for place in (0, len(data) // 2, len(data) - 1):
        assert shares.sample(data[:place] + b"?" + data[place + 1 :]) != known
    assert shares.sample(data + data) != known
    assert len({shares.sample(data[:size]) for size in (0, 1, 100, 16384, 16385, 50000)}) == 6


def test_a_part_without_images_is_a_cache_that_a_merge_takes_and_a_run_refuses(tmp_path, toy_model):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png", "a cat")
    shop.encode("a fox")
    roots = encode_parts(shop, 3, "a fox")
    assert sorted(map(len, paths_of(roots))) == [0, 0, 1]
    assert encode_parts(shop, 3, "a fox") == roots  # again, with nothing to do
    merge_caches(roots, tmp_path / "merged")
    assert_same_rows(tmp_path / "merged", shop.root)
    empty = next(root for root, paths in zip(roots, paths_of(roots), strict=True) if not paths)
    assert verify_cache(empty).problems == ()
    with pytest.raises(CacheError, match="None of the 2 caches holds an image"):
        merge_caches([root for root in roots if len(open_cache(root)) == 0], tmp_path / "none", is_incomplete=True)
    done = Cli(tmp_path)(train_app, "run", str(empty), "--model", str(toy_model))
    assert (done.code, "no item" in done.err or "holds no" in done.err) == (2, True), done.err


def test_a_merge_names_the_parts_that_are_missing_doubled_or_of_another_split(seven, tmp_path):
    roots, out = seven.parts, tmp_path / "merged"
    half = changed(roots[0], tmp_path / "half", part=Part((1,), 2))
    cases = (
        (roots[::2], "Parts 1 and 3 of 3: part 2 is missing", "--incomplete"),
        ([roots[0], *roots], f"Part 1 of 3 is in {roots[0]} and in {roots[0]}", "once"),
        ([roots[0], half], f"{roots[0]} holds part 1 of 3, and {half} part 1 of 2", "--part I/3"),
        ([seven.whole, roots[0]], "Part 1 of 3: parts 2 and 3 are missing", "--part 2/3"),
    )
    for parts, problem, fix in cases:
        with pytest.raises(CacheStale) as caught:
            merge_caches(parts, out)
        assert caught.value.problem == problem
        assert fix in caught.value.fix
        assert not out.exists()


def test_parts_that_are_merged_early_merge_with_the_rest_later(seven, tmp_path):
    roots = seven.parts
    merge_caches([roots[0], roots[2]], tmp_path / "some", is_incomplete=True)
    assert read_manifest(tmp_path / "some").part == Part((1, 3), 3)
    assert verify_cache(tmp_path / "some").problems == ()
    merge_caches([tmp_path / "some", roots[1]], tmp_path / "all")
    assert_same_rows(tmp_path / "all", seven.whole)


def test_pairs_go_with_their_targets_and_their_pairs_to_draw_are_in_every_part(tmp_path, toy_edit_model):
    shop = EditShop(tmp_path, toy_edit_model)
    for i in range(4):
        instruction = f"turn the whole bright day into a dark and starry night {i}"
        shop.put_pair(f"{i}.png", f"{instruction}\n{instruction} without a moon", seed=i)
    shutil.copy(shop.sources / "0.png", shop.sources / "1.png")  # one source of two targets
    drawn = WantedEdit(str(shop.sources / "0.png"), "make the whole sky much bluer and the sea very calm")
    shop.encode(drawn, flip=True)
    roots = encode_parts(shop, 2, drawn, flip=True)
    merge_caches(roots, tmp_path / "merged")
    assert_same_rows(tmp_path / "merged", shop.root)


def test_rows_of_tables_and_tars_keep_the_order_of_the_source(tmp_path, toy_model):
    pictures = [png(i) for i in range(11)]
    tar(tmp_path / "t.tar", {f"{i}.{kind}": data if kind == "png" else f"cat {i}"
                             for i, data in enumerate(pictures) for kind in ("png", "txt")})  # fmt: skip
    parquet(tmp_path / "t.parquet", pictures, [f"cat {i}" for i in range(11)])
    for name in ("t.tar", "t.parquet"):
        shop = Workshop(tmp_path / name.replace(".", "_"), toy_model)
        shop.source = tmp_path / name
        shop.encode()
        roots = encode_parts(shop, 2)
        merge_caches(roots, shop.root.with_name("merged"))
        assert_same_rows(shop.root.with_name("merged"), shop.root)
    assert len(set(map(str, paths_of(roots)))) == 2


def test_a_cache_of_a_part_is_only_encoded_as_that_part(seven, toy_model, tmp_path):
    roots, cli = seven.parts, Cli(tmp_path)
    model = ("--model", str(toy_model), "--device", "cpu", "--set", "cache.resolution=64")
    cases = (
        (roots[0], ("--part", "2/3"), f"{roots[0]} holds part 1 of 3 of a source, and part 2/3 was asked for"),
        (roots[0], (), f"{roots[0]} holds part 1 of 3 of a source, and the whole source was asked for"),
        (seven.whole, ("--part", "2/3"), f"{seven.whole} was encoded without --part, and part 2/3 was asked for"),
    )
    for command in ("encode", "plan", "diff"):
        for root, part, problem in cases:
            device = model if command != "diff" else model[:2] + model[4:]
            done = cli(app, command, str(seven.source), "-o", str(root), *part, *device)
            assert (done.code, problem in " ".join(done.err.split())) == (2, True), (command, done.err)


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("0/8", "--part 0/8: parts are counted from 1", "--part $((INDEX + 1))/8"),
        ("9/8", "--part 9/8: there is no part 9 of 8", "--part 1/8 to --part 8/8"),
        ("a/b", "--part a/b is not a part of a whole", "I/N"),
        ("3", "--part 3 is not a part of a whole", "I/N"),
        ("-1/8", "--part -1/8 is not a part of a whole", "I/N"),
        ("1/0", "--part 1/0: there can be 1 to 1,000,000 parts", "I/N"),
        ("", "--part  is not a part of a whole", "I/N"),
    ],
)
def test_what_is_no_part_is_refused_with_what_to_write(text, problem, fix):
    with pytest.raises(K5Error) as caught:
        read_part(text)
    assert caught.value.problem == problem
    assert fix in caught.value.fix
    assert (read_part(None), read_part("03/8"), read_part("1/1")) == (None, Part((3,), 8), Part((1,), 1))


def test_the_command_line_encodes_plans_and_tells_of_parts_and_names_the_merge(tmp_path, toy_model):
    shop = Workshop(tmp_path / "shop", toy_model)
    for i in range(4):
        shop.put(f"{i}.png", f"cat {i}", seed=i)
    cli = Cli(tmp_path / "shop")
    options = ("--model", str(toy_model), "--set", "cache.resolution=64")
    planned = [json.loads(cli(app, "plan", "images", "--part", f"{n}/2", *options, "--json").out) for n in (1, 2)]
    assert sum(plan["num_images"] for plan in planned) == 4
    told = [json.loads(cli(app, "diff", "images", "--part", f"{n}/2", *options, "--json").out) for n in (1, 2)]
    assert [entry["num_items"] for entry in told] == [plan["num_images"] for plan in planned]
    assert "part          1 of 2" in cli(app, "plan", "images", "--part", "1/2", *options).out
    for number in (1, 2):
        done = cli(app, "encode", "images", "--part", f"{number}/2", *options, "--device", "cpu")
        assert done.code == 0, done.err
    merge = "k5cache merge cache/images-1-of-2 cache/images-2-of-2 -o cache/images"
    assert f"Next, when all 2 parts are encoded: {merge}" in " ".join(done.out.split())
    assert json.loads(cli(app, "info", "cache/images-2-of-2", "--json").out)["part"] == "2/2"
    assert "2 of 2" in cli(app, "info", "cache/images-2-of-2").out
    done = cli(app, *merge.split()[1:])
    assert done.code == 0, done.err
    assert "is up to date: 4 items" in cli(app, "encode", "images", *options).out
