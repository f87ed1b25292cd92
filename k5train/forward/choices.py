"""In which steps do the compiler's kernels walk along a row? In steps that divide it, where they can.

The compiler takes a power of two near the row's width, 2,048 for the 2,560 of the full-size model: the second step is
then mostly empty, and every program has threads without work.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

_WIDTHS = range(1025, 4097)  # the compiler keeps narrower rows in registers; for wider ones it made no difference
_MOST_STEPS = 8


def step_for(width: int) -> int | None:
    """The step along rows of so many numbers. None: the compiler's own."""
    step = width & -width
    return step if width in _WIDTHS and step >= 256 and width // step <= _MOST_STEPS else None


def row_choices() -> Any:
    """Inductor's choices, with ours for rows. Inductor calls this when it first generates code."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.triton import FixedTritonConfig

    class RowChoices(InductorChoices):
        """See this file."""

        def uuid(self) -> str:
            """Tells compiled code apart by how it was chosen."""
            return f"k5train rows {_WIDTHS} {_MOST_STEPS} 1"

        def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> Any:
            """For rows of 2,560, on an H200: 27 us instead of 41 to normalise and quantise 4,096 of them, 37 instead of
            59 with a residual, 72 instead of 116 in the backward pass.
            """
            kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
            tiling = groups[0] if groups else None
            if not isinstance(tiling, dict) or set(tiling) != {"x", "r0_"} or "fixed_config" in kwargs:
                return kwargs
            width = tiling["r0_"]
            step = step_for(int(width)) if getattr(width, "is_Integer", False) else None
            if step is None or any(kwargs.get(f"override_{k}_reduction") for k in ("persistent", "cooperative")):
                return kwargs
            config = {"XBLOCK": 1, "R0_BLOCK": step, "num_warps": max(1, step // 256), "num_stages": 1}
            return {**kwargs, "fixed_config": FixedTritonConfig(config)}

    return RowChoices()


def choose_rows() -> None:
    """Have code generated with our choices from now on. Does nothing where torch asks nobody, or somebody else."""
    import torch._inductor.config as inductor

    if hasattr(inductor, "inductor_choices_class") and inductor.inductor_choices_class is None:
        inductor.inductor_choices_class = row_choices
        _ask_again()


def leave_rows() -> bool:
    """Have code generated with the compiler's own choices again. Returns whether this changes anything."""
    import torch._inductor.config as inductor

    if not are_ours():
        return False
    inductor.inductor_choices_class = None
    _ask_again()
    return True


def are_ours() -> bool:
    """Whether code is generated with our choices."""
    inductor = sys.modules.get("torch._inductor.config")  # not imported for this: that takes a while
    return getattr(inductor, "inductor_choices_class", None) is row_choices


def _ask_again() -> None:
    """Inductor keeps the choices of each thread that has generated code."""
    from torch._inductor import virtualized

    with suppress(AttributeError):
        delattr(virtualized.threadlocal, virtualized._choices._key)
