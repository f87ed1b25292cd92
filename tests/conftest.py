"""What do all tests share? The toy checkpoint and whatever else is made once a run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# Toy tensors: threads that wait for each other cost ten times what they save. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # `pipelines` is not installed: tests reach it from the repo


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``once("name", make)``: a folder that ``make`` filled, once a run whatever the number of workers.

    Read it, never write into it: workers share it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # pytest-xdist: one folder above the workers'

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def toy_model(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A whole Kandinsky 5 Image in the diffusers layout, seed 0."""
    from pipelines.demo.make_checkpoint import make

    return once("toy_model", make)


@pytest.fixture(scope="session")
def toy_cache(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``toy_cache("bf16")`` or ``"fp32"``: ``parity.make_cache`` of the toy's encoders in that precision, once."""
    from tests.parity import make_cache

    made: dict[str, Path] = {}

    def cache(precision: str) -> Path:
        if precision not in made:
            made[precision] = make_cache(tmp_path_factory.mktemp(precision), toy_model, precision)
        return made[precision]

    return cache
