"""Fixtures that all tests share: the toy checkpoint, its caches, and whatever else is made once for the whole run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from k5cache.shared import progress

if TYPE_CHECKING:
    from tests.workshop import Workshop

# Toy tensors: threads that wait for each other cost ten times what they save. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as k5train does: a plan relies on it
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a page of frames for each try to connect
# Nobody pulls the plug here, and a disk takes milliseconds for each of ten thousand calls. Tests of fsync replace it.
os.fsync = lambda descriptor: None
sys.path.insert(0, str(Path(__file__).parent.parent))  # `pipelines` is not installed: tests import it from the checkout
progress.SECONDS_TO_THE_FIRST = 60.0  # on a busy machine a test would read a line that it does not expect
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` has it ignored, children too
gc.disable()  # until all tests are imported: their modules make a million objects, of which none is garbage

Once = Callable[[str, Callable[[Path], object]], Path]
MANY_MODULES = 100


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.enable()
    spare_the_collector()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # extension modules complain at exit about objects that were never freed


@pytest.fixture(autouse=True)
def _spare_the_collector():
    """An encode collects garbage after each encoder; the libraries' million objects would cost 0.3 s each time."""
    before = len(sys.modules)
    yield
    if len(sys.modules) > before + MANY_MODULES:  # the test was the first to import torch, diffusers or the like
        spare_the_collector()


def spare_the_collector() -> None:
    """Collect garbage once, then leave everything that is still alive out of later collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once("name", make)`` returns a folder that ``make`` filled, once for all workers of a run.

    Only read it: the workers share it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # pytest-xdist: the folder above the workers' own

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def toy_model(once: Once) -> Path:
    """A whole Kandinsky 5 Image in the diffusers layout, seed 0."""
    from pipelines.demo.make_checkpoint import make

    return once("toy_model", make)


@pytest.fixture(scope="session")
def toy_edit_model(once: Once) -> Path:
    """The same for image-to-image, with an image processor's config in ``tokenizer/``, seed 0."""
    from pipelines.demo.make_checkpoint import make

    return once("toy_edit_model", lambda folder: make(folder, is_i2i=True))


@pytest.fixture(scope="session")
def toy_cache(toy_model: Path, once: Once) -> Callable[[str], Path]:
    """``toy_cache("bf16")`` or ``toy_cache("fp32")``: ``parity.make_cache``, the encoders in that precision."""
    from tests.parity import make_cache

    def cache_of(precision: str) -> Path:
        root = once(f"toy_cache_{precision}", lambda folder: make_cache(folder, toy_model, precision))
        return root / "cache" / "pictures"

    return cache_of


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an object store in this process, one for each file of tests."""
    from tests.object_store import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture
def store(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which commands reach an empty bucket of that store."""
    from tests.object_store import make_store

    return make_store(server, tmp_path, monkeypatch)


@pytest.fixture
def shop(tmp_path: Path, once: Once, toy_model: Path) -> Workshop:
    """Six pictures and their cache, in ``shop/cache``."""
    from tests.object_store import shop_of_six

    return shop_of_six(tmp_path, once, toy_model)
