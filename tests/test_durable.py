"""What would a power cut leave? A file is on the disk before it gets its name, and its name before anything goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from k5cache.cli import app as k5cache
from k5train.cli import app as k5train
from tests.cli import Cli
from tests.workshop import Workshop

Number = tuple[int, int]
"""A file's or folder's number: device and inode."""


@dataclass
class Disk:
    """Follows fsync, rename and unlink below a folder, and notes what a power cut could undo in the wrong order."""

    root: Path
    synced: dict[Number, tuple[int, int]] = field(default_factory=dict)
    """Of a file: its size and mtime when fsync was called. Of a folder: its mtime."""
    unsynced_folders: set[str] = field(default_factory=set)
    """In which a name was given that is not yet on disk."""
    wrong: list[str] = field(default_factory=list)
    names: int = 0

    def fsync(self, descriptor: int) -> None:
        info = os.fstat(descriptor)
        self.synced[info.st_dev, info.st_ino] = (info.st_size, info.st_mtime_ns)
        self.unsynced_folders.discard(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def before_rename(self, source: Path, target: Path) -> None:
        if not target.resolve().is_relative_to(self.root):
            return
        self.names += 1
        for path in [source, *(source.rglob("*") if source.is_dir() else ())]:
            info = path.stat()
            if self.synced.get((info.st_dev, info.st_ino)) != (info.st_size, info.st_mtime_ns):
                self.wrong.append(f"{path} became {target} before its bytes were on disk")

    def after_rename(self, target: Path) -> None:
        if target.resolve().is_relative_to(self.root) and not target.name.startswith("."):
            self.unsynced_folders.add(str(target.parent.resolve()))

    def before_unlink(self, path: Path) -> None:
        of_ours = [folder for folder in self.unsynced_folders if path.resolve().is_relative_to(folder)]
        if of_ours and not any(part.startswith(".") for part in path.relative_to(path.anchor).parts):
            self.wrong.append(f"{path} was deleted while a new name in {of_ours} was not on disk")


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Disk:
    watched = Disk(tmp_path.resolve())
    monkeypatch.setattr(os, "fsync", watched.fsync)
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def give_name(source: str | Path, target: str | Path, original: Callable = original, **options: int) -> None:
            is_discarded = Path(target).name.startswith(".tmp-old-")
            if not is_discarded and not options:
                watched.before_rename(Path(source), Path(target))
            original(source, target, **options)
            if not is_discarded and not options:
                watched.after_rename(Path(target))

        monkeypatch.setattr(os, name, give_name)
    unlink = os.unlink

    def delete(path: str | Path, **options: int) -> None:
        if not options:
            watched.before_unlink(Path(path))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", delete)
    return watched


def test_whatever_gets_a_name_is_on_the_disk_before_and_its_name_before_anything_goes(
    tmp_path, toy_model, disk, monkeypatch
):
    monkeypatch.setenv("K5_HOME", str(tmp_path / "home"))
    shop = Workshop(tmp_path, toy_model)
    for i in range(3):
        shop.put(f"{i}.png", f"number {i}", seed=i)
    shutil.copytree(tmp_path / "images", tmp_path / "more")
    values = {
        "steps": 3, "checkpoint_every": 1, "checkpoints_total_limit": 1, "base_model_precision": "no_change",
        "mixed_precision": "fp32", "device": "cpu", "lora.rank": 2, "lora.alpha": 2, "optim.ema_decay": 0.9,
    }  # fmt: skip
    chosen = [word for key, value in values.items() for word in ("--set", f"train.{key}={value}")]
    encode = ("--model", str(toy_model), "--device", "cpu", "--set", "cache.resolution=64")
    cli = Cli(tmp_path)
    for app, *line in (
        (k5cache, "encode", "images", *encode, "-o", "cache/a"),
        (k5cache, "encode", "more", *encode, "-o", "cache/b"),
        (k5cache, "prompts", "add", "cache/a", "a fox", "--device", "cpu"),
        (k5cache, "merge", "cache/a", "cache/b", "-o", "cache/c"),
        (k5train, "run", "cache/a", *chosen, "-o", "runs/a"),
        (k5train, "resume", "runs/a", "--set", "train.steps=5"),
        (k5train, "base", "prepare", "--model", str(toy_model)),
        (k5train, "export", "runs/a/a.safetensors", "-o", "out.safetensors", "--model", str(toy_model)),
    ):
        before = disk.names
        done = cli(app, *line)
        assert done.code == 0, done.err
        assert disk.names > before, line
        assert disk.unsynced_folders == set(), line
        assert disk.wrong == [], line
    (tmp_path / "images" / "0.png").unlink()
    for line in (("encode", "images", *encode, "-o", "cache/a"), ("gc", "cache/a")):
        done = cli(k5cache, *line)
        assert done.code == 0, done.err
        assert disk.wrong == [], line
    assert disk.unsynced_folders == set()
    assert disk.names > 50


def test_a_name_too_early_and_a_deletion_too_early_are_noticed(tmp_path, disk):
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("new")
    new.rename(tmp_path / "file")
    assert disk.wrong == [f"{new} became {tmp_path / 'file'} before its bytes were on disk"]
    old.write_text("old")
    old.unlink()
    assert disk.wrong[1].startswith(f"{old} was deleted while a new name in ")
    assert disk.unsynced_folders == {str(tmp_path)}
