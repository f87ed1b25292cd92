"""Where what only Linux has is missing: every module is imported, and files, locks and caches are what they are."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from k5cache.shared import home, host_memory, lock, system
from k5cache.shared.files import new_file, remove_leftovers, write_json
from k5cache.shared.handed_over import handed_over
from k5cache.shared.plain import UnfitFile, read_plain
from k5cache.store.manifest import lock as lock_cache
from k5cache.store.reader import OPEN_SHARDS, most_open
from tests.other_systems import ATTRIBUTES, MODULES
from tests.store_samples import make_cache
from tests.test_guards import CACHE, TRAINER, module_of
from tests.test_store_damage import read_everything


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what Windows lacks, for whoever looks from now on."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module, names in ATTRIBUTES.items():
        for name in names.split():
            monkeypatch.delattr(importlib.import_module(module), name, raising=False)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a system that lacks them."""
    with monkeypatch.context() as patched:
        hide(patched)
        yield tmp_path


def test_every_module_is_imported_where_they_are_missing(monkeypatch):
    """In a fork of this process, which has imported the libraries already: these know Windows by themselves."""
    names = [module_of(path) for path in (*CACHE, *TRAINER) if path.name != "__main__.py"]
    if importlib.util.find_spec("triton") is None:
        for name in (
            "kernels",
            "few_keys",
            "row_kernels",
            "hopper",
        ):  # Triton's own; only imported where there is a GPU
            names.remove(f"k5train.forward.{name}")
    for name in names:
        importlib.import_module(name)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        problem = ""
        try:
            hide(monkeypatch)
            for name in [name for name in sys.modules if name.split(".")[0] in ("k5cache", "k5train")]:
                module = sys.modules.pop(name)
                if hasattr(module, "_library"):
                    module._library._destroy()  # torch refuses a second definition of an op
            for name in names:
                importlib.import_module(name)
            assert sys.modules["k5cache.shared.system"] is not system
            assert len([name for name in sys.modules if name.startswith("k5")]) >= len(names)
        except BaseException:  # a fork of pytest must not go on
            problem = traceback.format_exc()
        os.write(into, problem.encode()[-60_000:])
        os._exit(0)
    os.close(into)
    watch = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    watch.start()
    with os.fdopen(out, "rb") as pipe:
        assert pipe.read().decode() == ""
    watch.cancel()
    assert os.waitpid(child, 0) == (child, 0)


def test_a_cache_is_written_locked_and_read_there(elsewhere):
    root = elsewhere / "cache"
    make_cache(root)
    read_everything(root)
    with (
        lock_cache(root),
        pytest.raises(lock.Locked, match=f"process {os.getpid()} on "),
        lock.lock_file(root / ".lock"),
    ):
        pass
    assert most_open() == OPEN_SHARDS


def test_files_appear_whole_there_and_what_a_killed_process_left_is_removed(elsewhere):
    with new_file(elsewhere / "new") as file:
        file.write(b"one\n")
    write_json(elsewhere / "a.json", {"b": "c"})
    assert (elsewhere / "new").read_bytes() == b"one\n"
    assert (elsewhere / "a.json").read_bytes() == b'{\n  "b": "c"\n}\n'
    dead = subprocess.run([sys.executable, "-S", "-c", "import os; print(os.getpid())"], capture_output=True).stdout
    for pid, is_left in ((int(dead), False), (os.getppid(), True), (os.getpid(), False)):
        folder = elsewhere / f".{pid}-a.json"
        folder.mkdir()
        assert remove_leftovers(elsewhere) == []
        assert folder.exists() == is_left


def test_bytes_are_read_at_a_place_by_many_threads_there(elsewhere):
    (elsewhere / "file").write_bytes(bytes(range(256)) * 64)
    fd = system.open_bytes(elsewhere / "file", may_wait=False)
    wrong: list[int] = []

    def read(start: int) -> None:
        memory = bytearray(1), bytearray(3)
        for at in range(start, 4096, 7):
            expected = bytes((at + i) % 256 for i in range(4))
            count = system.read_into(fd, memory, at)
            wrong.extend([at] * (system.read_at(fd, 4, at) != expected or b"".join(memory) != expected or count != 4))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    system.read_at_random(fd)
    os.close(fd)
    assert wrong == []


def test_links_folders_and_large_files_are_refused_there(elsewhere):
    (elsewhere / "file").write_bytes(b"12345")
    (elsewhere / "link").symlink_to("file")
    with pytest.raises(OSError, match="link") as caught:
        system.open_bytes(elsewhere / "link", os.O_RDWR, is_followed=False)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(UnfitFile, match="it is a folder"):
        read_plain(elsewhere)
    with pytest.raises(UnfitFile, match="at most 4 are read"):
        read_plain(elsewhere / "file", 4)
    assert read_plain(elsewhere / "link") == b"12345"


def test_nobody_is_another_user_and_nothing_is_limited_where_that_is_not_known(elsewhere):
    elsewhere.chmod(0o777)
    home.check_trusted(elsewhere)
    assert not system.is_anothers(elsewhere.stat())
    assert (system.user_name(5), system.is_private_group(5)) == ("user 5", False)
    assert system.most_open_files() is None
    with system.on_one_core():
        pass


def test_without_proc_the_free_memory_is_what_psutil_says(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5 * 2**30))
    assert host_memory.free_ram(tmp_path) == 5 * 2**30
    assert 2**20 < system.resident_bytes() < 2**40


@pytest.mark.parametrize("refused", [(), ("symlink_to",), ("symlink_to", "hardlink_to")])
def test_a_library_is_handed_its_files_where_links_are_not_allowed(tmp_path, monkeypatch, toy_model, refused):
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    for name in refused:
        monkeypatch.setattr(Path, name, refuse)
    weights = next((toy_model / "vae").glob("*.safetensors"))
    with handed_over(toy_model, "vae") as only:
        given = only / weights.name
        assert given.read_bytes() == weights.read_bytes()
        assert (given.is_symlink(), given.stat().st_nlink > 1) == (not refused, len(refused) == 1)
    assert weights.exists()


def test_an_interrupt_and_the_end_of_a_process_work_without_signals_of_unix(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for name in ("posix", "nt"):
            with monkeypatch.context() as patched:
                patched.setattr(system.os, "name", name)
                threading.Timer(0.05, system.interrupt).start()
                with pytest.raises(KeyboardInterrupt):
                    [time.sleep(0.05) for _ in range(100)]
    finally:
        signal.signal(signal.SIGINT, before)
    with monkeypatch.context() as patched:
        patched.delattr(os, "killpg")
        sleeps = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
        system.end_with_children(sleeps)
        assert sleeps.returncode == -signal.SIGKILL
        system.end_with_children(sleeps)


def test_the_lock_is_the_flock_that_earlier_versions_take_and_byte_0_is_left_to_windows(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    with lock.lock_file(path):
        assert path.read_bytes().startswith(b' {"pid": ')
        with path.open("rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(lock.Locked, match=r"^another process$"), lock.lock_file(path, 0.1):
            pass
        path.write_text('{"pid": 5, "host": "earlier", "since": "today"}')
        with pytest.raises(lock.Locked, match=r"^process 5 on earlier since today$"), lock.lock_file(path):
            pass
    assert lock.holder(path) is None  # whoever wrote it, the lock is free
    read_at = system.read_at

    def as_windows(fd: int, num_bytes: int, at: int) -> bytes:
        if at == 0:
            raise PermissionError(errno.EACCES, "another process has locked a portion of the file")
        return read_at(fd, num_bytes, at)

    monkeypatch.setattr(system, "read_at", as_windows)
    owner = rf"^process {os.getpid()} on .+ since 2"
    with lock.lock_file(path), pytest.raises(lock.Locked, match=owner), lock.lock_file(path):
        pass


def test_who_has_a_lock_is_told_without_writing_or_taking_it(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    assert lock.holder(path) is None
    assert not path.exists()
    with lock.lock_file(path):
        before = path.read_bytes(), path.stat().st_mtime_ns
        found = lock.holder(path)
        assert found is not None
        assert (found.pid, found.is_here) == (os.getpid(), True)
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert lock.holder(path) is None
    owner = json.loads(before[0])
    # A process that was interrupted leaves its number: with none of that number here, the lock is not even tried.
    for text in (b"", b"[]", b"5", b"not JSON", json.dumps({**owner, "pid": 2**22 + 5}).encode(), b'{"pid": "5"}'):
        path.write_bytes(text)
        with monkeypatch.context() as patch:
            patch.setattr(lock, "lock_descriptor", None)
            assert lock.holder(path) is None, text
    elsewhere = {**owner, "host": "another-machine"}
    path.write_text(json.dumps(elsewhere))
    assert lock.holder(path) is None
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert lock.holder(path) == lock.Holder(owner["pid"], "another-machine", owner["since"], is_here=False)
    (tmp_path / "link").symlink_to(path)
    assert lock.holder(tmp_path / "link") is None
    os.mkfifo(tmp_path / "pipe")
    assert lock.holder(tmp_path / "pipe") is None
    assert lock.holder(tmp_path) is None
