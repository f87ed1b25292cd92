"""What does a selftest test when it is told nothing? The only cache there is, or the demo's toy model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k5cache.shared.errors import CacheError, ModelError

MAKER = Path(__file__).parents[2] / "pipelines" / "demo" / "make_checkpoint.py"


def only_cache(command: str) -> Path | None:
    """The only cache under ``cache/``; None where there is none.

    Raises:
        CacheError: there are several.
    """
    found = sorted(path.parent for path in Path("cache").glob("*/manifest.json"))
    if len(found) > 1:
        names = ", ".join(map(str, found[:4])) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        raise CacheError(f"There are {len(found)} caches: {names}", f"Say which one: {command} {found[0]}")
    return found[0] if found else None


@contextmanager
def toy_model() -> Iterator[Path]:
    """A folder in the diffusers layout, deleted afterwards. Another process makes it: it imports the encoders.

    Raises:
        ModelError: this is not a checkout of the repository, or the maker fails.
    """
    if not MAKER.is_file():
        raise ModelError(
            "There is no cache and no model to test, and the toy model is not part of the installed package",
            "Give a cache, or a model with --model DIR",
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(MAKER), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(
                f"{MAKER} failed: {done.stderr.strip().splitlines()[-1:]}", "Give a model with --model DIR"
            )
        yield Path(folder)
