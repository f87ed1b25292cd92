"""Does compiled code work on this machine, and is it faster? This is measured before the training time starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def compile_if_faster(
    modules: Sequence[nn.Module], step: Callable[[], Any], shapes: Callable[[], Any], say: Callable[[str], None]
) -> None:
    """Compile modules in place; if that fails or is slower, they stay eager.

    Args:
        step: a forward and backward pass of the usual size, which is timed.
        shapes: passes of every size that occurs. The first size is compiled as it is, later ones for any size.
    """
    torch._dynamo.config.recompile_limit = 64  # blocks of several sizes share one forward; torch allows 8 in all
    eager, started = milliseconds(step), time.monotonic()
    for module in modules:
        module.compile()
    try:
        shapes()
        compiled = milliseconds(step)
    # Dynamo, inductor, Triton and gcc each raise errors of their own, and none is worth losing a GPU's hour.
    except Exception as error:
        say(f"not compiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
        compiled = float("inf")
    if compiled >= eager:
        for module in modules:
            module._compiled_call_impl = None
    say(f"a step: {eager:.1f} ms eager, {compiled:.1f} ms compiled in {time.monotonic() - started:.0f} s")


def milliseconds(step: Callable[[], Any], count: int = 10) -> float:
    """The mean time of ``count`` steps, after three that are not counted."""
    for _ in range(3):
        step()
    synchronize()
    started = time.monotonic()
    for _ in range(count):
        step()
    synchronize()
    return 1000 * (time.monotonic() - started) / count


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def eager() -> contextlib.AbstractContextManager[Any]:
    """A context without compiled code: passes without gradients or of another size would be compiled again."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance else contextlib.nullcontext()
