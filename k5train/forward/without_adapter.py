"""How does a transformer predict as if it had no adapter, between two steps of its training?

Peft's layers have a switch for it. Lean blocks gather their weights once, with the adapters, and leave the adapters out
while the switch is on: gathering anew in every step would take longer, and might lay fused weights out again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_IS_ON: ContextVar[bool] = ContextVar("without_adapter", default=False)


def is_without_adapter() -> bool:
    """Whether blocks are to leave their adapters out."""
    return _IS_ON.get()


def adapter_layers(transformer: nn.Module) -> list[Any]:
    """Peft's layers of a transformer. To be looked up once: it takes tens of milliseconds."""
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapter(layers: Sequence[Any]) -> Iterator[None]:
    """Within the block a transformer computes what its base computes. Which adapters are active stays as it is.

    Not to be entered while a backward pass is still to recompute blocks.

    Args:
        layers: ``adapter_layers`` of the transformer.
    """
    before = [layer._disable_adapters for layer in layers]
    token = _IS_ON.set(True)
    try:
        for layer in layers:
            layer._disable_adapters = True  # `enable_adapters(False)` would also freeze what is trained
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
        _IS_ON.reset(token)
