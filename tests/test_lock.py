"""The lock of a folder that several processes or machines see: it is of the file that is there, and of one process."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.shared import lock as locks
from k5cache.shared.errors import OutputError, RunError
from k5cache.shared.lock import Locked, holder, lock_file
from k5cache.shared.model import ModelConfig
from k5cache.store.manifest import lock as lock_cache
from k5train.options.train import TrainConfig
from k5train.runs import folder
from k5train.runs.folder import create_run, lock_run, new_run, open_run
from tests.test_outputs import tree

CONFIG = (ModelConfig(), TrainConfig())
OTHER = (ModelConfig(), replace(TrainConfig(), steps=7))


def test_a_lock_whose_file_was_deleted_before_it_was_had_is_tried_again_on_the_file_that_is_there(
    tmp_path, monkeypatch
):
    path, real = tmp_path / ".lock", locks.lock_descriptor
    path.touch()

    def late(descriptor: int, blocking: bool) -> bool:
        monkeypatch.setattr(locks, "lock_descriptor", real)
        path.unlink()  # a run was refused at its start, and its folder is removed
        return real(descriptor, blocking=blocking)

    monkeypatch.setattr(locks, "lock_descriptor", late)
    with lock_file(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(Locked), lock_file(path):
            pass

    def taken(descriptor: int, blocking: bool) -> bool:
        late(descriptor, blocking)
        stack.__enter__()  # and another process has made it again
        return True

    stack = lock_file(path)
    monkeypatch.setattr(locks, "lock_descriptor", taken)
    with pytest.raises(Locked), lock_file(path):
        pass
    stack.__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_as_that(tmp_path, monkeypatch, number):
    def refuse(descriptor: int, blocking: bool) -> bool:
        raise OSError(number, os.strerror(number))

    run = create_run(tmp_path / "run", Path("cache"), *CONFIG)
    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    for user in (lock_run(run), lock_cache(tmp_path / "cache")):
        with pytest.raises(OutputError, match=r"\.lock cannot be locked: ") as caught, user:
            pass
        assert "Mount its file system with locks" in caught.value.fix
    assert holder(run.root / ".lock") is None


def test_who_has_a_lock_is_told_of_other_machines_dead_processes_and_numbers_that_were_given_again(tmp_path):
    path = tmp_path / ".lock"
    for pid, host in ((os.getppid(), "here"), (2**22 - 1, "here"), (1, "elsewhere")):
        owner = {"pid": pid, "host": os.uname().nodename if host == "here" else host, "since": "2026-01-01"}
        path.write_text(json.dumps(owner), encoding="utf-8")
        assert holder(path) is None  # its process is gone, whoever has its number now
        with lock_file(path):
            pass
    with lock_file(path):
        path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "2026-01-01"}), encoding="utf-8")
        found = holder(path)
        assert found is not None
        assert (found.pid, found.host, found.is_here) == (7, "elsewhere", False)
        with pytest.raises(Locked) as caught, lock_file(path):
            pass
        assert caught.value.owner == "process 7 on elsewhere since 2026-01-01"


def test_of_two_machines_that_begin_a_run_in_one_folder_at_once_one_is_refused_and_the_others_recipe_stays(
    tmp_path, monkeypatch
):
    root, make_folder = tmp_path / "run", folder.make_folder

    def as_the_other_begins(path: Path) -> None:
        monkeypatch.setattr(folder, "make_folder", make_folder)
        create_run(root, Path("other"), *OTHER)  # after the first one found the folder free

    monkeypatch.setattr(folder, "make_folder", as_the_other_begins)
    with pytest.raises(RunError, match="already holds a run"), new_run(root, Path("cache"), *CONFIG):
        pass
    _, _, config, cache = open_run(root)
    assert (config.steps, cache.name) == (7, "other")


def test_a_run_is_not_begun_in_a_folder_that_another_process_is_making_or_training(tmp_path):
    (tmp_path / "run").mkdir()
    with lock_file(tmp_path / "run/.lock"):
        before = tree(tmp_path)
        with pytest.raises(RunError, match="is being trained by process"):
            create_run(tmp_path / "run", Path("cache"), *CONFIG)
        assert tree(tmp_path) == before
    create_run(tmp_path / "run", Path("cache"), *CONFIG)  # what a killed process left is an empty lock
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.lock").write_text("my notes", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds \.lock"):
        create_run(tmp_path / "mine", Path("cache"), *CONFIG)
    assert (tmp_path / "mine/.lock").read_text(encoding="utf-8") == "my notes"


def test_a_run_that_is_refused_removes_nothing_that_another_process_works_on(tmp_path):
    root = tmp_path / "run"
    another = lock_file(root / ".lock")
    before = {}

    def refused() -> None:
        with new_run(root, Path("cache"), *CONFIG):
            another.__enter__()  # the same command on another machine goes on with it
            before.update(tree(root))
            raise RunError("refused", "mend it")

    with pytest.raises(RunError, match="refused"):
        refused()
    assert tree(root) == before
    assert (root / "recipe.toml").is_file()
    another.__exit__(None, None, None)
