"""How much memory has the card? Asked of NVIDIA's own tool, which answers at once; torch takes seconds."""

from __future__ import annotations

import shutil
import subprocess

from k5cache.shared.console import parse_bytes
from k5cache.shared.errors import RecipeError
from k5cache.shared.foreign import shown

USUAL = "16GB"
"""What is offered where no card is found."""


def size_of_card() -> str | None:
    """The first card's memory such as ``24GB``; None if there is none, or it does not say."""
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return f"{round(float(answer.split()[0]) / 1024)}GB"  # a card of 24 GB says 24564 MiB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # a driver that does not answer
        return None


def check_size(answer: str) -> str:
    """``16``, ``16 GB`` and ``16gb`` as ``16GB``.

    Raises:
        RecipeError: it is not an amount of memory, or no card has so little.
    """
    fix = 'Answer with the size of your card, such as "12GB"'
    try:
        num_bytes = parse_bytes(answer)
    except ValueError:
        raise RecipeError(f"{shown(answer)!r} is not an amount of memory", fix) from None
    if num_bytes < 2**30:
        raise RecipeError(f"{shown(answer)} is no card's memory", fix)
    gigabytes = num_bytes / 2**30
    return f"{gigabytes:.0f}GB" if gigabytes.is_integer() else f"{num_bytes // 2**20}MB"
