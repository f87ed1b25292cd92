"""Which items do a folder, its metadata, a table, tars and a dataset give, and which message if they give none?"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources.find import default_name, find
from k5cache.sources.images import hash_content, image_size
from k5cache.sources.items import Skipped, UnreadableImage, stat_numbers
from k5cache.sources.metadata import SPLIT_WORDS
from tests.picture_files import colour


@pytest.fixture(autouse=True, scope="module")
def own_dataset_cache(tmp_path_factory):
    """Keep the cache of `datasets` out of the home of whoever runs the tests."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def put(root: Path, **files: str | bytes) -> Path:
    """Write files. In a keyword ``__`` stands for a slash and the last ``_`` for a dot."""
    for name, content in files.items():
        path = root / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def tar(path: Path, **members: str | bytes) -> Path:
    """A tar; names as in ``put``."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(".".join(name.rsplit("_", 1)))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def rows(*images: tuple[bytes, str], **columns: list[object]):
    """A `datasets` dataset with an ``image`` and a ``text`` column."""
    import datasets

    cells = [{"bytes": image, "path": f"{i}.png"} for i, (image, _) in enumerate(images)]
    dataset = datasets.Dataset.from_dict({"image": cells, "text": [text for _, text in images], **columns})
    return dataset.cast_column("image", datasets.Image())


def captions(source: Path, **options: object) -> dict[str, tuple[str, ...]]:
    return {item.path: item.captions for item in find(source, CacheConfig(**options)).items}


def refusal(source: Path, **options: object) -> str:
    """The one line of the error, and the line that says what to do."""
    with pytest.raises(DatasetError) as caught:
        find(source, CacheConfig(**options))
    assert "\n" not in caught.value.problem
    return f"{caught.value.problem}; {caught.value.fix}"


# --- a plain folder ---


def test_every_line_of_a_caption_file_is_a_caption(tmp_path):
    put(tmp_path, cat_jpg="", cat_txt="a cat\n\n a tabby \n")
    assert captions(tmp_path) == {"cat.jpg": ("a cat", " a tabby ")}


def test_a_file_name_is_a_caption_with_underscores_and_hyphens_as_spaces(tmp_path):
    for name in ("red_fox-at__dusk.jpg", "sub_1/Ünïcode v1.5.png", "-_.png"):
        put(tmp_path / Path(name).parent)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = find(tmp_path, CacheConfig(caption_strategy="filename"))
    assert {item.path: item.captions for item in source.items} == {
        "red_fox-at__dusk.jpg": ("red fox at dusk",),
        "sub_1/Ünïcode v1.5.png": ("Ünïcode v1.5",),
    }
    assert source.skipped == [Skipped("-_.png", "empty caption")]


def test_an_instance_prompt_is_the_caption_of_every_image(tmp_path):
    put(tmp_path, a_jpg="", sub__b_png="", b_txt="not read")
    config = {"caption_strategy": "instanceprompt", "instance_prompt": " a sks dog "}
    assert captions(tmp_path, **config) == {"a.jpg": (" a sks dog ",), "sub/b.png": (" a sks dog ",)}


@pytest.mark.parametrize(
    ("trigger", "caption"), [("sks", "sks, a cat"), ("sks ", "sks a cat"), ("sks, ", "sks, a cat"), ("", "a cat")]
)
def test_a_trigger_is_put_before_every_caption(tmp_path, trigger, caption):
    put(tmp_path, cat_jpg="", cat_txt="a cat\na cat")
    assert captions(tmp_path, trigger=trigger) == {"cat.jpg": (caption, caption)}
    assert captions(tmp_path, trigger=trigger, caption_strategy="filename") == {"cat.jpg": (caption.replace("a ", ""),)}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"caption_strategy": "instanceprompt"}, 'instance_prompt and caption_strategy = "instanceprompt" need each'),
        ({"instance_prompt": "a dog"}, 'instance_prompt and caption_strategy = "instanceprompt" need each other'),
        ({"crop": "none", "buckets": "square"}, 'crop = "none" needs buckets = "native"'),
        ({"minimum_image_size": -1}, "minimum_image_size must be 0 or more, found -1"),
        ({"resolution": 1504}, "resolution makes a bucket with a side of 2064 pixels, the model takes 2048"),
    ],
)
def test_options_that_contradict_each_other_are_named(options, problem):
    [message] = CacheConfig(**options).check()
    assert message.startswith(problem)


def test_a_plain_folder_needs_neither_datasets_nor_arrow(tmp_path):
    put(tmp_path, cat_jpg="", cat_txt="a cat")
    code = (
        "import sys, pathlib, k5cache.options, k5cache.sources.find as s\n"
        f"s.find(pathlib.Path({str(tmp_path)!r}), k5cache.options.CacheConfig())\n"
        "print(sorted({'datasets', 'pyarrow', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- metadata, as imagefolder defines it ---


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three images in two folders."""
    return put(tmp_path / "set", a_png=png(1), sub__b_png=png(2), sub__c_png=png(3))


# `datasets`' imagefolder leaves its CSV files open for the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_metadata_gives_what_imagefolder_gives(pictures):
    import datasets

    put(
        pictures,
        metadata_csv="file_name,text\na.png,one\n",
        sub__metadata_csv='file_name,text\nb.png,"two, too"\nc.png,3\n',
    )
    config = CacheConfig(caption_strategy="metadata")
    source = find(pictures, config)
    ours = [(str(pictures / item.path), *item.captions) for item in source.items]
    theirs = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    gc.collect()  # here, where the warning is expected, and not in a later test
    assert ours == sorted((row["image"]["path"], str(row["text"])) for row in theirs)
    assert [path for path, _ in ours] == [str(pictures / name) for name in ("a.png", "sub/b.png", "sub/c.png")]
    assert source.skipped == []


def test_the_words_for_splits_are_those_of_datasets():
    from datasets.data_files import SPLIT_KEYWORDS

    assert {str(split): tuple(words) for split, words in SPLIT_KEYWORDS.items()} == SPLIT_WORDS


SPLIT_FOLDERS = (
    ("train", "test"), ("train", "val", "extra"), ("my_train", "dev-1"), ("training 2", "evaluation"), ("a", "trains"),
    ("train/test", "train/b"), ("test", "extra"),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("folders", SPLIT_FOLDERS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_folders_named_like_splits_are_the_splits_that_imagefolder_finds(tmp_path, folders, split):
    import datasets

    source = tmp_path / "set"
    for i, folder in enumerate(folders):
        put(source / folder, a_png=png(i), metadata_csv=f"file_name,text\na.png,{folder}\n")
    theirs = None
    if split in datasets.get_dataset_split_names("imagefolder", data_dir=str(source)):
        theirs = sorted(datasets.load_dataset("imagefolder", data_dir=str(source), split=split)["text"])
    gc.collect()  # here, where the warning is expected, and not in a later test
    config = CacheConfig(caption_strategy="metadata", split=split)
    if theirs is None and folders == ("a", "trains"):  # a folder without splits is used whatever the split's name
        theirs = ["a", "trains"]
    if theirs is None:
        assert f"set has no split {split}; its folders name t" in refusal(
            source, caption_strategy="metadata", split=split
        )
        return
    found = find(source, config)
    assert sorted(item.captions[0] for item in found.items) == theirs
    others = {f"{folder}/a.png" for folder in folders if folder not in theirs}
    assert {skip.path for skip in found.skipped} == others
    assert all(skip.reason.startswith(("belongs to the split ", "has no row in ")) for skip in found.skipped)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_splits_that_a_readme_declares_come_before_those_of_names(tmp_path):
    import datasets

    source = tmp_path / "set"
    for name in ("one", "two", "train"):
        put(source / name, a_png=png(1), metadata_csv=f"file_name,text\na.png,{name}\n")
    data_files = "[{split: train, path: 'one/*'}, {split: test, path: ['two/*', 'train/*']}]"
    (source / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n")
    for split, other in (("train", {"two/a.png", "train/a.png"}), ("test", {"one/a.png"})):
        theirs = datasets.load_dataset(str(source), split=split)["text"]
        found = find(source, CacheConfig(caption_strategy="metadata", split=split))
        assert sorted(item.captions[0] for item in found.items) == sorted(theirs)
        reason = f"is not in the split {split} of the README"
        assert {skip.path: skip.reason for skip in found.skipped} == dict.fromkeys(other, reason)
    (source / "README.md").write_bytes(b"caf\xe9, no YAML")  # declares nothing
    assert list(captions(source, caption_strategy="metadata")) == ["train/a.png"]
    gc.collect()  # here, where the warning is expected, and not in a later test
    assert "has no split dev; its folders name train" in refusal(source, caption_strategy="metadata", split="dev")


def test_rows_of_one_file_for_all_are_sorted_into_splits_by_the_images_folders(tmp_path):
    put(tmp_path, train__a_png=png(1), test__b_png=png(2), c_png=png(3))
    rows_of = [{"file_name": name, "text": name} for name in ("train/a.png", "test/b.png", "c.png")]
    put(tmp_path, metadata_jsonl="\n".join(map(json.dumps, rows_of)))
    source = find(tmp_path, CacheConfig(caption_strategy="metadata"))
    assert [item.path for item in source.items] == ["c.png", "train/a.png"]
    assert source.skipped == [Skipped("test/b.png", "belongs to the split test")]
    assert list(captions(tmp_path, caption_strategy="metadata", split="train+test")) == [
        "c.png",
        "test/b.png",
        "train/a.png",
    ]
    assert list(captions(tmp_path, caption_strategy="metadata", split="train[:1]")) == ["train/a.png"]


def test_a_slice_of_several_metadata_files_is_refused(pictures):
    put(pictures, metadata_csv="file_name,text\na.png,one\n", sub__metadata_csv="file_name,text\nb.png,two\n")
    said = refusal(pictures, caption_strategy="metadata", split="train[:1]")
    assert "cache.split = train[:1] is a part of one table, and " in said
    assert "has 2 metadata files; Set cache.split without [ ]" in said


def test_an_image_that_two_metadata_files_name_has_the_captions_of_both(pictures):
    put(pictures, metadata_csv="file_name,text\nsub/b.png,one\n", sub__metadata_csv="file_name,text\nb.png,two\n")
    assert captions(pictures, caption_strategy="metadata") == {"sub/b.png": ("one", "two")}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "one"}\n{"file_name": "sub/b.png", "caption": "two"}\n'),
        ("metadata.csv", "caption,file_name,other\none,a.png,x\ntwo,sub/b.png,y\n"),
        ("metadata.csv", "\ufefffile_name,caption\r\na.png,one\r\nsub/b.png, two \r\n"),
    ],
)
def test_metadata_may_be_json_lines_or_csv_and_images_without_a_row_are_reported(pictures, name, content):
    (pictures / name).write_text(content, encoding="utf-8", newline="")
    source = find(pictures, CacheConfig(caption_strategy="metadata"))
    assert [(i.path, [c.strip() for c in i.captions]) for i in source.items] == [
        ("a.png", ["one"]),
        ("sub/b.png", ["two"]),
    ]
    assert source.skipped == [Skipped("sub/c.png", f"has no row in {name}")]


def test_an_item_of_metadata_is_the_file_with_its_stat(pictures):
    put(pictures, metadata_jsonl='{"file_name": "sub/b.png", "text": "two"}')
    source = find(pictures, CacheConfig(caption_strategy="metadata"))
    [item] = source.items
    assert (item.num_bytes, item.mtime_ns, item.inode) == stat_numbers((pictures / "sub/b.png").stat())
    assert source.read(item.path) == pictures / "sub/b.png"


def test_rows_of_metadata_that_name_no_image_are_skipped_one_by_one(pictures):
    lines = ["a.png", "gone.png", "../outside.png", "/etc/passwd", "http://x.org/a.png", ""]
    (pictures.parent / "outside.png").write_bytes(png(9))
    put(pictures, metadata_jsonl="\n".join(json.dumps({"file_name": name, "text": "a cat"}) for name in lines))
    source = find(pictures, CacheConfig(caption_strategy="metadata"))
    assert [item.path for item in source.items] == ["a.png"]
    reasons = [skip.reason for skip in source.skipped]
    assert reasons == [
        "is named in metadata.jsonl line 2 but does not exist",
        "lies outside the folder of its table (metadata.jsonl line 3)",
        "lies outside the folder of its table (metadata.jsonl line 4)",
        "is a URL: download the images first (metadata.jsonl line 5)",
        "names no file (metadata.jsonl line 6)",
        "has no row in metadata.jsonl",
        "has no row in metadata.jsonl",
    ]


def test_a_file_named_in_several_rows_has_all_their_captions(pictures):
    put(pictures, metadata_csv="file_name,text\na.png,one\na.png,another\n./a.png,\n")
    source = find(pictures, CacheConfig(caption_strategy="metadata"))
    assert [(item.path, item.captions) for item in source.items] == [("a.png", ("one", "another"))]
    assert Skipped("a.png", "empty caption (metadata.csv line 4)") in source.skipped


@pytest.mark.parametrize("cells", [("007", "8", "9"), ("null", "NA", "nan"), ("1e5", "True", "2020-01-01")])
def test_cells_of_csv_are_the_text_that_they_are(pictures, cells):
    names = ("a.png", "sub/b.png", "sub/c.png")
    lines = "".join(f"{name},{cell}\n" for name, cell in zip(names, cells, strict=True))
    put(pictures, metadata_csv=f"file_name,text\n{lines}")
    assert list(captions(pictures, caption_strategy="metadata").values()) == [(cell,) for cell in cells]


def test_metadata_that_is_not_there_or_of_two_kinds_is_named(pictures):
    assert "set has none of metadata.jsonl, metadata.csv" in refusal(pictures, caption_strategy="metadata")
    assert "cache.caption_strategy=metadata to use sub/metadata.csv" in refusal(put(pictures, sub__metadata_csv="x"))
    put(pictures, metadata_jsonl="{}")
    assert "metadata files of several kinds: metadata.jsonl, sub/metadata.csv" in refusal(
        pictures, caption_strategy="metadata"
    )


# --- tables ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cats.csv", "image,prompt\na.png,one\nsub/b.png,two\n"),
        ("cats.tsv", "image_path\tprompt\na.png\tone\nsub/b.png\ttwo\n"),
        ("cats.jsonl", '{"path": "a.png", "prompt": ["one"]}\n{"path": "sub/b.png", "prompt": ["two"]}\n'),
        ("cats.json", '[{"path": "a.png", "prompt": "one"}, {"path": "sub/b.png", "prompt": "two"}]'),
    ],
)
def test_a_table_names_image_files_beside_it(pictures, name, content):
    (pictures / name).write_text(content)
    assert captions(pictures / name) == {"a.png": ("one",), "sub/b.png": ("two",)}


def test_columns_may_be_chosen_and_a_list_is_several_captions(pictures):
    put(pictures, t_jsonl='{"picture": "a.png", "text": "x", "said": {"by": {"cat": ["miaow", null, " purr "]}}}')
    options = {"image_column": "picture", "caption_column": "said.by.cat"}
    assert captions(pictures / "t.jsonl", **options) == {"a.png": ("miaow", " purr ")}


def test_a_parquet_table_of_images_gives_their_very_bytes(tmp_path):
    images = [png(10), png(20, (8, 2))]
    rows((images[0], "one"), (images[1], "two")).to_parquet(tmp_path / "t.parquet")
    source = find(tmp_path / "t.parquet", CacheConfig())
    assert [(item.path, item.captions) for item in source.items] == [
        ("t.parquet#0", ("one",)),
        ("t.parquet#1", ("two",)),
    ]
    assert [source.read(item.path) for item in source.items] == images
    (tmp_path / "direct.png").write_bytes(images[1])
    assert hash_content(source.read("t.parquet#1")) == hash_content(tmp_path / "direct.png")
    assert image_size(source.read("t.parquet#1")) == (8, 2)
    assert captions(tmp_path / "t.parquet", caption_strategy="filename") == {
        "t.parquet#0": ("0",),
        "t.parquet#1": ("1",),
    }


def test_a_rows_stat_is_its_tables_and_its_own_and_stays_until_the_table_changes(tmp_path):
    def stats() -> list[tuple[int, int, int]]:
        return [(i.num_bytes, i.mtime_ns, i.inode) for i in find(tmp_path / "t.parquet", CacheConfig()).items]

    rows((png(1), "one"), (png(2), "two")).to_parquet(tmp_path / "t.parquet")
    before = stats()
    assert before == stats()
    stat = (tmp_path / "t.parquet").stat()
    assert {(size, time) for size, time, _ in before} == {(stat.st_size, stat.st_mtime_ns)}
    assert len(set(before)) == 2
    os.utime(tmp_path / "t.parquet", ns=(1, stat.st_mtime_ns + 1000))
    assert not set(before) & set(stats())


def test_rows_without_an_image_or_a_caption_are_skipped(tmp_path):
    dataset = rows((png(1), "one"), (png(2), " "), (b"", "three"), (png(4), "four"))
    import datasets

    table = datasets.concatenate_datasets(
        [dataset, datasets.Dataset.from_dict({"image": [None], "text": ["five"]}, features=dataset.features)]
    )
    table.to_parquet(tmp_path / "t.parquet")
    source = find(tmp_path / "t.parquet", CacheConfig())
    assert [item.path for item in source.items] == ["t.parquet#0", "t.parquet#2", "t.parquet#3"]
    assert source.skipped == [Skipped("t.parquet#1", "empty caption"), Skipped("t.parquet#4", "holds no image")]
    with pytest.raises(UnreadableImage, match="is empty"):
        image_size(source.read("t.parquet#2"))


def test_a_split_may_be_a_slice(tmp_path):
    rows(*((png(i), f"number {i}") for i in range(4))).to_parquet(tmp_path / "t.parquet")
    source = find(tmp_path / "t.parquet", CacheConfig(split="train[1:3]"))
    assert [item.captions for item in source.items] == [("number 1",), ("number 2",)]
    assert [source.read(item.path) for item in source.items] == [png(1), png(2)]


def test_a_folder_of_parquet_files_is_a_dataset_with_splits(tmp_path):
    (tmp_path / "data").mkdir()
    rows((png(1), "one")).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    rows((png(2), "two")).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert list(captions(tmp_path).values()) == [("one",)]
    assert list(captions(tmp_path, split="test").values()) == [("two",)]
    assert "has no split dev; it has train, test" in refusal(tmp_path, split="dev")


def test_a_saved_dataset_is_read_from_its_folder(tmp_path):
    import datasets

    rows((png(1), "one")).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows((png(2), "two")), "test": rows((png(3), "three"))}).save_to_disk(
        tmp_path / "many"
    )
    assert list(captions(tmp_path / "one").values()) == [("one",)]
    assert list(captions(tmp_path / "one" / "data-00000-of-00001.arrow").values()) == [("one",)]
    source = find(tmp_path / "many", CacheConfig(split="test"))
    assert [(item.captions, source.read(item.path)) for item in source.items] == [(("three",), png(3))]
    assert "many has no split dev; it has train, test" in refusal(tmp_path / "many", split="dev")


# --- tars ---


def test_a_tar_pairs_its_members_by_name(tmp_path):
    path = tar(tmp_path / "cats.tar", b_png=png(2), b_txt="two\ntoo\n", a_png=png(1), a_txt="one")
    source = find(path, CacheConfig())
    assert [(item.path, item.captions) for item in source.items] == [
        ("cats.tar/a.png", ("one",)),
        ("cats.tar/b.png", ("two", "too")),
    ]
    assert source.read("cats.tar/b.png") == png(2)
    assert captions(path, caption_strategy="filename") == {"cats.tar/a.png": ("a",), "cats.tar/b.png": ("b",)}


def test_several_tars_are_one_source_by_a_pattern_or_by_their_folder(tmp_path):
    for i in range(2):
        tar(tmp_path / f"cats-{i}.tar", x_png=png(i), x_json=json.dumps({"caption": f"number {i}", "seed": 7}))
    expected = {"cats-0.tar/x.png": ("number 0",), "cats-1.tar/x.png": ("number 1",)}
    assert captions(tmp_path / "cats-*.tar", caption_column="json.caption") == expected
    assert captions(tmp_path, caption_column="json.caption") == expected
    assert "json has fields caption, seed" in refusal(tmp_path, caption_column="json.text")


def test_a_changed_tar_leaves_the_stats_of_others_rows(tmp_path):
    def stats() -> dict[str, tuple[int, int]]:
        return {i.path: (i.mtime_ns, i.inode) for i in find(tmp_path, CacheConfig()).items}

    for i in range(2):
        tar(tmp_path / f"{i}.tar", x_png=png(i), x_txt="one")
    before = stats()
    tar(tmp_path / "1.tar", x_png=png(5), x_txt="one")
    assert {path for path, stat in stats().items() if before[path] == stat} == {"0.tar/x.png"}


def test_a_mask_in_a_tar_belongs_to_the_image_of_its_name(tmp_path):
    path = tar(tmp_path / "t.tar", **{"a_png": png(1), "a.mask_png": png(2), "a_txt": "one"})
    source = find(path, CacheConfig())
    [item] = source.items
    assert item.mask is not None
    assert item.mask.path == "t.tar/a.mask.png"
    assert source.read(item.mask.path) == png(2)


def test_members_of_one_name_are_used_once(tmp_path):
    members = [("a.png", png(1)), ("a.txt", b"one"), ("b.png", png(2)), ("b.txt", b"two"), ("a.png", png(3))]
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in [*members, ("a.txt", b"other")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = find(tmp_path / "t.tar", CacheConfig())
    assert [(i.captions, source.read(i.path)) for i in source.items] == [(("other",), png(3)), (("two",), png(2))]
    said = "is there twice: the later one is used, as tar itself does"
    assert source.skipped == [Skipped("t.tar/a.png", said), Skipped("t.tar/a.txt", said)]


# --- what cannot be used at all ---


def test_a_folder_with_other_files_and_hidden_tables_holds_no_image(tmp_path):
    put(tmp_path, config_json="{}", notes_csv="a,b", **{".hidden__t_parquet": "x"})
    assert refusal(tmp_path).startswith(f"{tmp_path} has no image; Put images (.apng .avif")


def test_what_is_nowhere_is_said_without_asking_the_hub_unless_it_may_be_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(Path("nowhere")).startswith("There is no folder nowhere; Give a folder of images")
    assert refusal(Path("./no/where/at/all")).startswith("There is no folder no/where/at/all")
    said = refusal(Path("owner/none"))
    assert said.startswith("There is no file or folder owner/none, and as a dataset of the hub it cannot be loaded: ")
    assert "Cannot reach https://huggingface.co" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "image,text\na.png,a cat, a dog\n", "t.csv line 2 has 3 cells, the header has 2; Put"),
        ("t.csv", "image,text\na,b\na,b,c\n", "t.csv line 3 has 3 cells, the header has 2; Put"),
        ("t.csv", "", "t.csv has no header line"),
        ("t.csv", "text,text\na,b\n", "t.csv has two columns with the same name"),
        ("t.csv", b"image,text\n\xff\xfe", "t.csv is not UTF-8"),
        ("t.jsonl", '{"image": "a.png"}\n{"im', "t.jsonl line 2 is not JSON: Unterminated string"),
        ("t.parquet", "not parquet at all", "t.parquet cannot be read: it is not a Parquet file, or was cut off"),
        ("t.tar", "not a tar" * 300, "t.tar cannot be read as a tar: it is not a tar, nor a compressed one"),
        ("t.xls", "x", "t.xls is not a table: .xls; Give files of one kind: .csv"),
        ("t.csv", "name,words\na.png,b\n", "t.csv has no column of images; its columns are name, words; Set"),
        ("t.csv", "image,words\na.png,b\n", "t.csv has no column of captions; its columns are image, words; Set"),
        ("t.csv", "image,text,prompt\na.png,b,c\n", "t.csv has captions in text and prompt; its columns are"),
        ("t.csv", "image,text\n", "t.csv has no rows; Use"),
        ("t.csv", "image,text\ngone.png,x\n", "no image with a caption (1 skipped: gone.png: is named in t.csv line 2"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_says_why_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(tmp_path / name)


def test_a_column_that_is_not_there_is_named_with_those_that_are(pictures):
    put(pictures, t_csv="image,text\na.png,b\n")
    assert "t.csv has no column words; its columns are image, text; Set cache.caption_column" in refusal(
        pictures / "t.csv", caption_column="words"
    )
    assert "t.csv has no column pic; its columns are image, text; Set cache.image_column" in refusal(
        pictures / "t.csv", image_column="pic"
    )


def test_tars_without_pairs_and_datasets_without_images_are_refused(tmp_path):
    import datasets

    assert "t.tar has no column of captions; its columns are png" in refusal(
        tar(tmp_path / "t.tar", a_png=png(1), b_png=png(2))
    )
    assert "e.tar holds no files" in refusal(tar(tmp_path / "e.tar"))
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "t.parquet")
    assert "t.parquet has no column of images; its columns are text" in refusal(tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"image": ["a.png"], "text": ["one"]}).save_to_disk(tmp_path / "saved")
    assert "a.png: is named in data-00000-of-00001.arrow#0 but does not exist" in refusal(tmp_path / "saved")
    for state in ("[]", '{"_data_files": [3]}', '{"_data_files": [{"filename": 3}]}', '{"_data_files": []}'):
        (tmp_path / "saved/state.json").write_text(state)
        assert "state.json" in refusal(tmp_path / "saved")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": [{}]}')
    assert "dataset_dict.json has no names in splits" in refusal(tmp_path / "saved")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/cats", "cats"),
        ("data/a.b.csv", "a.b"),
        ("me/cats-v1.5", "cats-v1.5"),
        ("x/cats-*.tar", "cats"),
        ("me/cats", "cats"),
        ("*.tar", "images"),
    ],
)
def test_a_cache_is_named_after_its_source(source, name):
    assert default_name(Path(source)) == name


def test_a_picture_in_a_table_has_the_same_pixels_as_the_file(tmp_path):
    from k5cache.buckets import Bucket, cover
    from k5cache.sources.images import load_pixels

    (tmp_path / "a.png").write_bytes(png(77))
    pixels = load_pixels(png(77), cover(6, 4, Bucket(6, 4)))
    assert tuple(pixels[:, 0, 0].tolist()) == colour(tmp_path / "a.png") == (77, 0, 0)
