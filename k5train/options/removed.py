"""Which options of earlier versions are no longer here? None of them ever did anything.

What is said of a recipe that sets one stands in ``k5cache/shared/other_words.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REMOVED: Mapping[str, frozenset[str]] = {
    "objective": frozenset({"noise_offset"}),
    "lora": frozenset({"init_lora_weights"}),
    "memory": frozenset({"enable_model_cpu_offload", "group_offload_type"}),
}
"""By their table in ``[train]``."""


def without_removed(train: Mapping[str, Any]) -> dict[str, Any]:
    """``[train]`` of an older run as it would be saved today.

    Args:
        train: its table, with the tables below it.
    """
    return {
        key: {k: v for k, v in value.items() if k not in REMOVED[key]} if key in REMOVED else value
        for key, value in train.items()
    }
