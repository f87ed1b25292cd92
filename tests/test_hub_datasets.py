"""What is downloaded of a dataset of the hub, and does it give what its files hold?"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources.find import Source, find
from tests.table_files import parquet, png, tar

COMMIT = "1111aaaa" * 5
NO_ROUTE = HfHubHTTPError.__mro__[1]("no route to host")  # what the client's own errors descend from


class Hub:
    """A stand-in for the hub with one dataset, which is the folder ``files``; it notes what is downloaded."""

    def __init__(self, home: Path) -> None:
        self.files = home / "files"
        self.files.mkdir()
        self.snapshot = home / "cache" / "datasets--me--cats" / "snapshots" / COMMIT
        self.problem: Exception | None = None

    @property
    def names(self) -> list[str]:
        return sorted(file.relative_to(self.files).as_posix() for file in self.files.rglob("*") if file.is_file())

    @property
    def downloaded(self) -> list[str]:
        return sorted(file.relative_to(self.snapshot).as_posix() for file in self.snapshot.rglob("*") if file.is_file())

    def dataset_info(self, repo: str, timeout: float) -> SimpleNamespace:
        if self.problem:
            raise self.problem
        assert repo == "me/cats"
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, repo: str, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        assert (repo, repo_type, revision) == ("me/cats", "dataset", COMMIT)
        for name in self.names:
            if not (self.snapshot / name).exists() and any(
                fnmatch.fnmatch(name, pattern) for pattern in allow_patterns
            ):
                (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.files / name, self.snapshot / name)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    of_one_dataset = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("k5cache.shared.hub.api", lambda quiet=False: of_one_dataset)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return of_one_dataset


def read(source: Source) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Path -> (content, captions)."""
    contents = {item.path: source.read(item.path) for item in source.items}
    data = {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in contents.items()}
    return {item.path: (data[item.path], item.captions) for item in source.items}


def test_only_the_files_of_the_split_and_configuration_are_downloaded(hub):
    card = "---\nconfigs:\n- config_name: small\n  data_dir: small\n- config_name: large\n  data_dir: large\n---\n"
    (hub.files / "README.md").write_text(card)
    for config in ("small", "large"):
        (hub.files / config).mkdir()
        for i, split in enumerate(("train", "test")):
            parquet(hub.files / config / f"{split}-0.parquet", [png(i), png(7)], [f"{config} {split}", "too"])
    config = CacheConfig(split="train[:1]", dataset_config="small")
    first = find(Path("me/cats"), config)
    assert read(first) == {"me/cats#0": (png(0), ("small train",))}
    assert hub.downloaded == ["README.md", "small/train-0.parquet"]
    assert find(Path("me/cats"), config).items == first.items
    with pytest.raises(DatasetError, match="me/cats has several configurations; it has small, large"):
        find(Path("me/cats"), CacheConfig())
    with pytest.raises(DatasetError, match="me/cats has no split dev; it has train, test"):
        find(Path("me/cats"), CacheConfig(split="dev", dataset_config="small"))


def test_images_with_metadata_are_those_that_the_metadata_of_the_split_names(hub):
    for i, split in enumerate(("train", "test")):
        (hub.files / split / "sub [1]").mkdir(parents=True)
        for j in range(2):
            (hub.files / split / "sub [1]" / f"{j}.png").write_bytes(png(10 * i + j))
        (hub.files / split / "metadata.csv").write_text("file_name,text\nsub [1]/0.png,one\nsub [1]/9.png,nine\n")
    source = find(Path("me/cats"), CacheConfig(split="test"))
    assert read(source) == {"test/sub [1]/0.png": (png(10), ("one",))}
    assert [(skip.path, skip.reason) for skip in source.skipped] == [
        ("test/sub [1]/9.png", "is named in metadata.csv line 3 but does not exist")
    ]
    assert hub.downloaded == ["test/metadata.csv", "test/sub [1]/0.png", "test/sub [1]/1.png"]


def test_images_without_metadata_may_have_their_names_as_captions(hub):
    (hub.files / "a_cat.png").write_bytes(png(1))
    assert read(find(Path("me/cats"), CacheConfig(caption_strategy="filename"))) == {"a_cat.png": (png(1), ("a cat",))}
    with pytest.raises(DatasetError, match="me/cats has no column of captions"):
        find(Path("me/cats"), CacheConfig())


def test_tars_and_tables_that_name_images_are_read_as_local_ones_are(hub):
    tar(hub.files / "x.tar", {"0.png": png(1), "0.txt": "one"})
    assert read(find(Path("me/cats"), CacheConfig())) == {"x.tar/0.png": (png(1), ("one",))}
    (hub.files / "x.tar").unlink()
    (hub.files / "pictures").mkdir()
    (hub.files / "pictures" / "[0].png").write_bytes(png(2))
    (hub.files / "pictures" / "1.png").write_bytes(png(3))
    (hub.files / "list.jsonl").write_text('{"image": "pictures/[0].png", "text": "two"}')
    card = "---\nconfigs:\n- config_name: default\n  data_files: list.jsonl\n---\n"
    (hub.files / "README.md").write_text(card)
    shutil.rmtree(hub.snapshot)
    assert read(find(Path("me/cats"), CacheConfig())) == {"pictures/[0].png": (png(2), ("two",))}
    assert hub.downloaded == ["README.md", "list.jsonl", "pictures/[0].png"]


def test_a_dataset_of_another_kind_is_refused_with_the_command_that_downloads_it(hub):
    (hub.files / "train.zip").write_bytes(b"x")
    with pytest.raises(DatasetError) as caught:
        find(Path("me/cats"), CacheConfig())
    assert caught.value.problem == "me/cats has neither tables nor tars nor images in this split, but .zip"
    assert "hf download me/cats --repo-type dataset --local-dir DIR" in caught.value.fix


@pytest.mark.parametrize("problem", [NO_ROUTE, ConnectionError("refused")])
def test_what_was_downloaded_serves_while_the_hub_cannot_be_reached_and_one_line_says_so(hub, capsys, problem):
    parquet(hub.files / "t.parquet", [png(1)], ["one"])
    online = find(Path("me/cats"), CacheConfig())
    capsys.readouterr()
    hub.problem = problem
    assert find(Path("me/cats"), CacheConfig()).items == online.items
    note = f"Using the downloaded copy of me/cats (commit 1111aaaa): cannot reach the hub ({problem})\n"
    assert capsys.readouterr() == ("", note)
    shutil.rmtree(hub.snapshot)
    with pytest.raises(DatasetError, match="There is no file or folder me/cats, and as a dataset of the hub it cannot"):
        find(Path("me/cats"), CacheConfig())


def test_who_asked_to_be_offline_is_not_told_so(hub, capsys, monkeypatch):
    parquet(hub.files / "t.parquet", [png(1)], ["one"])
    find(Path("me/cats"), CacheConfig())
    capsys.readouterr()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.problem = OfflineModeIsEnabled("offline")
    assert len(find(Path("me/cats"), CacheConfig()).items) == 1
    assert capsys.readouterr() == ("", "")


def test_half_a_download_is_not_taken_for_the_whole_while_the_hub_cannot_be_reached(hub):
    for i in range(2):
        parquet(hub.files / f"train-{i}.parquet", [png(i)], ["one"])
    find(Path("me/cats"), CacheConfig())
    hub.problem = NO_ROUTE
    (hub.snapshot / "train-1.parquet").unlink()
    trees = hub.snapshot.parent.parent / "trees"
    trees.mkdir()
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": {name: {} for name in hub.names}}))
    with pytest.raises(DatasetError, match=r"me/cats is incomplete on this machine \(train-1\.parquet is missing\)"):
        find(Path("me/cats"), CacheConfig())


def test_the_sources_of_image_to_image_are_downloaded_with_their_targets(hub):
    for name, data in {"a.png": png(1), "in/a.png": png(2), "b.png": png(3), "loose.png": png(4)}.items():
        (hub.files / name).parent.mkdir(exist_ok=True)
        (hub.files / name).write_bytes(data)
    (hub.files / "train.csv").write_text("image,source,text\na.png,in/a.png,red\nb.png,,x\n")
    found = find(Path("me/cats"), CacheConfig(), "i2i")
    assert [(item.path, item.source.path) for item in found.items] == [("a.png", "in/a.png")]
    assert Path(found.read_source("in/a.png")).read_bytes() == png(2)
    assert {skip.path: skip.reason for skip in found.skipped} == {
        "b.png": "has no source: its column source is empty (train.csv line 3)"
    }
    assert hub.downloaded == ["a.png", "b.png", "in/a.png", "train.csv"]
    (hub.files / "train.csv").unlink()
    rows = [{"file_name": "a.png", "source": "in/a.png", "text": "red"}, {"file_name": "b.png", "text": "x"}]
    (hub.files / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = find(Path("me/cats"), CacheConfig(), "i2i")
    assert [(item.path, item.source.path, item.captions) for item in found.items] == [("a.png", "in/a.png", ("red",))]
    with pytest.raises(DatasetError, match=r"--sources is for folders of images, and me/cats is no folder"):
        find(Path("me/cats"), CacheConfig(source_dir=str(hub.files)), "i2i")
