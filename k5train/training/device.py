"""Which device does a run train on?"""

from __future__ import annotations

from pathlib import Path

import torch

from k5cache.shared import console
from k5cache.shared import device as device_module
from k5cache.shared.errors import RunError
from k5cache.shared.part_files import weight_files

LARGE = 4 * 2**30  # bytes of bf16 weights that are too many to train on a CPU


def pick_device(name: str, folder: Path) -> torch.device:
    """The device to train on.

    Raises:
        K5Error: ``name`` asks for a GPU and there is none.
        RunError: ``name`` is auto, there is no GPU, and the model has its full size.
    """
    device = device_module.pick_device(name, "train.device=")
    num_bytes = sum(f.stat().st_size for f in weight_files(folder, "transformer")) if device == "cpu" else 0
    if name == "auto" and num_bytes > LARGE:
        raise RunError(
            f"There is no GPU that torch {torch.__version__} sees, and the transformer has "
            f"{console.human_bytes(num_bytes)} of weights: one step on a CPU would take minutes",
            "Run on a machine with a GPU and torch for CUDA; --set train.device=cpu trains on the CPU all the same",
        )
    return torch.device(device)
