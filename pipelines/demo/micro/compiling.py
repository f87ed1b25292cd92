"""Is compiled code faster here, and does it work at all? Asked of the machine before the clock runs."""

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
    """Compile modules in place; where that fails or is slower they stay as they were.

    Args:
        step: a forward and backward pass of the usual size, to be timed.
        shapes: the passes that meet every size there is. The first is compiled as it is, later ones for any size.
    """
    torch._dynamo.config.recompile_limit = 64  # blocks of several sizes share one forward; torch allows 8 in all
    eager, started = milliseconds(step), time.monotonic()
    for module in modules:
        module.compile()
    try:
        shapes()
        compiled = milliseconds(step)
    # Dynamo, inductor, Triton and gcc each fail in their own way; an hour on a GPU is worth more than a tidy error.
    except Exception as error:
        say(f"not compiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
        compiled = float("inf")
    if compiled >= eager:
        for module in modules:
            module._compiled_call_impl = None
    say(f"a step: {eager:.1f} ms eager, {compiled:.1f} ms compiled in {time.monotonic() - started:.0f} s")


def milliseconds(step: Callable[[], Any], count: int = 10) -> float:
    """A step's time, the mean of ``count`` after three that are not counted."""
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
    """Without compiled code: what needs no gradients, or is of another size, would be compiled anew."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance else contextlib.nullcontext()
