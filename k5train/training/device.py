"""What a run starts from: the device, and a cache that fits the transformer, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from k5cache.shared import console
from k5cache.shared import device as device_module
from k5cache.shared.checkpoint import weight_files
from k5cache.shared.errors import RunError

LARGE = 4 * 2**30  # bytes of bf16 weights from which a CPU is no place to train


def pick_device(name: str, folder: Path) -> torch.device:
    """The device to train on.

    Raises:
        K5Error: ``name`` asks for a GPU and there is none.
        RunError: ``name`` is auto, there is no GPU, and a full-size model would train on the CPU.
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


@contextmanager
def determinism(is_on: bool, what: object = None) -> Iterator[None]:
    """Where asked for, only kernels that give the same bits every time; torch names an op that has none.

    Covers what is compiled too: nothing is then chosen by timing it, in this process or in the one that resumes.

    Args:
        what: kernels compiled for anything else than this are not used: the sizes at which a block was compiled are in
            its kernels, and not in the key by which torch finds them again.
    """
    if not is_on:
        yield
        return
    import torch._inductor.config as inductor
    import torch.compiler.config as compiler

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul; torch insists on it
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    settings = [(inductor, "deterministic", True), (compiler, "cache_key_tag", repr(what))]
    settings = [setting for setting in settings if hasattr(*setting[:2])]  # inductor's from torch 2.10 or so on
    had = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        for module, name, value in had:
            setattr(module, name, value)
