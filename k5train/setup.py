"""What a run starts from: the device, and a cache that fits the transformer, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k5cache import console
from k5cache.errors import CacheError, CacheStale, RunError
from k5cache.hub import read_config, weight_files
from k5train.fit import check_encoders
from k5train.skew import check_template

if TYPE_CHECKING:
    from k5cache.store.reader import Cache

LARGE = 4 * 2**30  # bytes of bf16 weights from which a CPU is no place to train
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(name: str, folder: Path) -> torch.device:
    """The device to train on.

    Raises:
        RunError: a GPU is asked for and there is none, or a full-size model would land on the CPU unasked.
    """
    if torch.cuda.is_available() and name != "cpu":
        return torch.device("cuda")
    if name == "cuda":
        raise RunError(
            f"train.device is cuda and torch {torch.__version__} sees no GPU", "Install torch for CUDA, or use cpu"
        )
    num_bytes = sum(f.stat().st_size for f in weight_files(folder, "transformer"))
    if name == "auto" and num_bytes > LARGE:
        raise RunError(
            f"There is no GPU that torch {torch.__version__} sees, and the transformer has "
            f"{console.human_bytes(num_bytes)} of weights: one step on a CPU would take minutes",
            "Run on a machine with a GPU and torch for CUDA; --set train.device=cpu trains on the CPU all the same",
        )
    return torch.device("cpu")


def check_fit(cache: Cache, folder: Path) -> None:
    """Refuse a cache whose tensors this transformer cannot take, before anything is loaded.

    Raises:
        CacheStale: widths differ, or the encoders' weights are not those beside the transformer: the cache was made by
            others; or the installed diffusers would encode its captions otherwise.
        CacheError: another program made it.
    """
    check_template(cache)
    check_encoders(cache, folder)
    wanted = read_config(folder, "transformer")
    if not isinstance(cache.manifest.recipe.get("selection", {}).get("resolution"), int):
        raise CacheError(
            f"{cache.root} was not made by `k5cache encode`: its recipe has no selection.resolution",
            "Encode into a new cache: k5cache encode SOURCE -o OTHER",
        )
    text = cache.prompt("")
    found = {"in_text_dim": text.prompt_embeds.shape[-1], "in_text_dim2": text.pooled.shape[-1]}
    for name, width in found.items():
        if width != wanted[name]:
            raise CacheStale(
                f"{cache.root} holds text embeddings {width} wide, the transformer in {folder} takes {wanted[name]}",
                "Encode with the same model: k5cache encode SOURCE -o OTHER --model DIR",
            )


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
