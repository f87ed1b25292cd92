"""How does a run with ``train.deterministic`` get the same bits every time?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def determinism(is_on: bool, compiled_for: object = None) -> Iterator[None]:
    """If ``is_on``, use only kernels that give the same bits every time; torch names an operation that has none.

    This covers compiled code too: no kernel is then chosen by timing it, neither in this process nor in one that
    resumes the run.

    Args:
        compiled_for: compiled code from a run with another value is not used. The sizes that a block was compiled at
            decide its kernels, but are not in the key by which torch looks compiled code up.
    """
    if not is_on:
        yield
        return
    import torch._inductor.config as inductor
    import torch.compiler.config as compiler

    # torch requires this setting; cuBLAS reads it at the first matmul.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    settings = [(inductor, "deterministic", True), (compiler, "cache_key_tag", repr(compiled_for))]
    settings = [setting for setting in settings if hasattr(*setting[:2])]  # inductor's exists from about torch 2.10
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        for module, name, value in before:
            setattr(module, name, value)
