"""What is refused before an adapter's file is read or written? These need no torch, which takes seconds to import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from k5cache.shared.errors import ModelError, RunError
from k5cache.shared.outputs import check_file
from k5cache.shared.units import count_of


def check_target(target: Path) -> None:
    """Refuse a file that cannot be written, before any work. A file that is there already is never replaced.

    Raises:
        OutputError: it cannot be written.
        RunError: it exists.
    """
    if target.is_file():
        raise RunError(f"{target} already exists", "Give another name with -o")
    check_file(target)


def check_model_folder(folder: Path | None) -> None:
    """Refuse a folder without a transformer. None: Kandinsky 5 Image Lite, which needs none.

    Raises:
        ModelError: there is no such folder, or no transformer in it.
    """
    if folder is not None and not (folder / "transformer" / "config.json").is_file():
        problem = f"{folder} has no transformer/config.json" if folder.is_dir() else f"There is no folder {folder}"
        raise ModelError(problem, "Give a model folder with --model, or leave it out for Kandinsky 5 Image Lite")


def check_weights(num_files: int, weights: Sequence[float]) -> None:
    """Refuse to merge files without one finite weight for each.

    Raises:
        RunError: says what is wrong.
    """
    if len(weights) != num_files:
        raise RunError(
            f"There are {num_files} files and {count_of(len(weights), 'weight')}",
            "Give one --weight for each file, in order",
        )
    if bad := [weight for weight in weights if not math.isfinite(weight)]:
        raise RunError(f"A weight of {bad[0]} makes every value of the LoRA useless", "Give finite numbers by --weight")
