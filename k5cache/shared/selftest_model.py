"""What does a selftest use if it is given neither cache nor model? The only cache, or the demo's toy model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k5cache.shared.command_line import this_command
from k5cache.shared.errors import CacheError, ModelError

MAKER = Path(__file__).parents[2] / "pipelines" / "demo" / "make_checkpoint.py"


def only_cache() -> Path | None:
    """The only cache under ``cache/``; None if there is none.

    Raises:
        CacheError: there are several.
    """
    caches = sorted(path.parent for path in Path("cache").glob("*/manifest.json"))
    if len(caches) > 1:
        names = ", ".join(map(str, caches[:4])) + (f" and {len(caches) - 4} more" if len(caches) > 4 else "")
        raise CacheError(f"There are {len(caches)} caches: {names}", f"Say which one: {this_command(caches[0])}")
    return caches[0] if caches else None


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
