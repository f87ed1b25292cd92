"""What do all tests share? The toy checkpoint, made once a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# Toy tensors: threads that wait for each other cost ten times what they save. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # `pipelines` is not installed: tests reach it from the repo


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Kandinsky 5 Image in the diffusers layout, seed 0. Read it, never write into it: workers share it."""
    from pipelines.demo.make_checkpoint import make

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # pytest-xdist: one folder above the workers'
    folder = shared / "toy_model"
    with FileLock(f"{folder}.lock"):
        if not (folder / "model_index.json").exists():  # written last
            make(folder)
    return folder


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
