"""Does a split have the files and rows that `datasets` says, also where its own patterns would break?"""

from __future__ import annotations

from pathlib import Path

import pytest

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources.find import find
from k5cache.sources.splits import files_of_split, rows_of_split, split_names

CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: "one/*.csv"
  - split: odd
    path: ["two/b.csv", "./c.csv"]
- config_name: large
  data_dir: two
---
"""
LAYOUTS = {
    "sharded": ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/test-00000-of-00001.csv"],
    "folders": ["train/a.csv", "train/sub/metadata.csv", "test/b.csv", "validation/c.csv"],
    "names": ["my_train.csv", "cats-test.csv", "dev.csv"],
    "all": ["a.csv", "sub/b.csv", ".hidden.csv", "__pycache__/c.csv", "config.json"],
    "card": ["one/a.csv", "two/b.csv", "two/train.csv", "c.csv", "README.md"],
}


def lay(root: Path, layout: str) -> Path:
    for name in LAYOUTS[layout]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(CARD if name == "README.md" else "text\nx\n", encoding="utf-8")
    return root


def ours(root: Path, split: str, dataset_config: str | None = None) -> list[str]:
    files = files_of_split(root, CacheConfig(split=split, dataset_config=dataset_config))
    return [file.relative_to(root).as_posix() for file in files]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_has_the_files_that_datasets_gives_it_also_below_a_folder_with_special_characters(tmp_path, layout):
    import datasets

    plain, special = lay(tmp_path / "plain", layout), lay(tmp_path / "a [1] *{x}%20#?::b", layout)
    for name in ("small", "large") if layout == "card" else (None,):
        splits = datasets.load_dataset_builder(
            str(plain), name=name, cache_dir=str(tmp_path / "cache")
        ).config.data_files
        assert splits
        for split, files in splits.items():
            theirs = sorted(Path(file).relative_to(plain.resolve()).as_posix() for file in files)
            assert ours(plain, str(split), name) == ours(special, str(split), name)
            assert sorted(ours(plain, str(split), name)) == theirs


def test_a_split_or_configuration_that_is_not_there_is_named_with_those_that_are(tmp_path):
    folders, card = lay(tmp_path / "folders", "folders"), lay(tmp_path / "card", "card")
    for root, options, said in (
        (folders, {"split": "dev"}, "folders has no split dev; it has train, validation, test"),
        (folders, {"dataset_config": "small"}, "folders has no configuration small; it has none"),
        (card, {}, "card has several configurations; it has small, large"),
        (card, {"dataset_config": "medium"}, "card has no configuration medium; it has small, large"),
        (tmp_path / "nothing", {}, "nothing has no split train; it has no data files"),
    ):
        root.mkdir(exist_ok=True)
        with pytest.raises(DatasetError) as caught:
            files_of_split(root, CacheConfig(**options))
        assert caught.value.problem.endswith(said)


@pytest.mark.parametrize("content", ["---\nconfigs: 7\n---\n", "---\nconfigs: [{}]\n---\n", "---\na: [\n---\n"])
def test_a_faulty_readme_is_named(tmp_path, content):
    lay(tmp_path, "all")
    (tmp_path / "README.md").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match="The README of"):
        files_of_split(tmp_path, CacheConfig())


@pytest.mark.parametrize("configs", ["7", "[7]", "{a: b}"])
def test_a_faulty_readme_beside_metadata_is_named(tmp_path, configs):
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n", encoding="utf-8")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\n")
    with pytest.raises(DatasetError, match=r"The README of .* declares no list of objects"):
        find(tmp_path, CacheConfig(caption_strategy="metadata"))


def test_a_readme_that_declares_nothing_divides_nothing_and_nothing_is_printed(tmp_path, capfd, caplog):
    lay(tmp_path, "all")
    (tmp_path / "README.md").write_text("# About these pictures", encoding="utf-8")
    assert ours(tmp_path, "train") == ["a.csv", "sub/b.csv"]
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_a_slice_has_the_rows_that_datasets_cuts():
    import datasets

    numbers = {"train": 207, "test": 11}
    data = {name: datasets.Dataset.from_dict({"n": [f"{name}{i}" for i in range(n)]}) for name, n in numbers.items()}
    for split in (
        "train",
        "train[3:7]",
        "train[-5:]",
        "test+train[200:]",
        "test[:50%]+train[:10%]",
        "train[:1%](pct1_dropremainder)",
    ):
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(numbers)
        theirs = [row for part in parts for row in data[part.splitname]["n"][part.from_ : part.to]]
        assert theirs
        assert [f"{name}{i}" for name, rows in rows_of_split("x", split, numbers) for i in rows] == theirs
        assert split_names(split) == list(dict.fromkeys(part.splitname for part in parts))


@pytest.mark.parametrize("split", ["train[1:", "train[a:b]", "train[:5%](half)"])
def test_a_slice_that_cannot_be_read_is_named(split):
    with pytest.raises(DatasetError, match=r"cache\.split is"):
        rows_of_split("x", split, {"train": 50})
