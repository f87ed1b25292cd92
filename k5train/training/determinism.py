"""How does a run with ``train.deterministic`` get the same bits every time?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from k5cache.shared import console


@contextmanager
def determinism(is_on: bool, compiled_for: object = None, *, is_compiled: bool = False) -> Iterator[None]:
    """If ``is_on``, use only kernels that give the same bits every time; torch names an operation that has none.

    This covers compiled code too: no kernel is then chosen by timing it, neither in this process nor in one that
    resumes the run.

    Args:
        compiled_for: compiled code from a run with another value is not used. The sizes that a block was compiled at
            decide its kernels, but are not in the key by which torch looks compiled code up.
        is_compiled: blocks are compiled for a GPU. If this torch cannot be kept from timing their kernels, warn.
    """
    if not is_on:
        yield
        return
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    import torch.compiler.config as compiler

    # torch requires this setting; cuBLAS reads it at the first matmul.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if is_compiled and not hasattr(inductor, "deterministic"):
        console.warn(
            f"torch {torch.__version__} chooses some compiled kernels by timing them, so the last bits of this run can"
            " change when it is resumed. Use torch 2.10 or later, or --set train.memory.execution=eager"
        )
    mode = torch.get_deterministic_debug_mode()
    settings = [
        *_not_by_timing(inductor),
        (compiler, "cache_key_tag", repr(compiled_for)),
        # In torch 2.13 settings belong to a thread. A backward pass that is compiled when it first runs is compiled in
        # a thread of autograd, which has none of these.
        (functorch, "force_non_lazy_backward_lowering", True),
    ]
    settings = [setting for setting in settings if hasattr(*setting[:2])]
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    try:
        torch.use_deterministic_algorithms(True)  # sets some of these itself
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        for module, name, value in before:
            setattr(module, name, value)


def _not_by_timing(inductor: Any) -> list[tuple[Any, str, Any]]:
    """The settings of the compiler with which it times no kernel: an object, the name of a field, and its value.

    ``deterministic`` is there from about torch 2.10, and is for sums. For kernels without a sum torch still times two
    sizes of a block in every process, and the bits depend on the size: with one number a thread, a product in the
    gradient of gelu is added without rounding it before; with two it is rounded (seen in Triton 3.6's code for sm_90).
    """
    wanted: list[tuple[Any, str, Any]] = [
        (inductor, "deterministic", True),
        (inductor.triton, "autotune_pointwise", False),
    ]
    # Off by default; a user may have turned them on in the environment.
    names = ("max_autotune", "max_autotune_pointwise", "max_autotune_gemm", "coordinate_descent_tuning")
    wanted += [(inductor, name, False) for name in (*names, "benchmark_fusion")]
    return [*wanted, (inductor.triton, "multi_kernel", 0)]
