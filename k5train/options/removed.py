"""Which options of other trainers do not exist here, and why?

A schema lists those of its table in ``removed``: the value that changes nothing, which recipes of older runs hold and
which is ignored; and what is said of any other value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Removed = Mapping[str, tuple[Any, str]]

OBJECTIVE: Removed = {
    "noise_offset": (
        0.0,
        "does not exist: it corrects schedules that never reach pure noise, and flow matching reaches it at sigma 1."
        " For darker or brighter pictures train more on noisy inputs: flow_schedule_shift = 3",
    )
}
LORA: Removed = {
    "init_lora_weights": (
        "default",
        "does not exist: PiSSA, OLoRA, CorDA and EVA move part of the base's weights into the adapter, and the base"
        " here is frozen, int8 and shared by every run. Leave it out; to start from a LoRA use init_lora",
    )
}
MEMORY: Removed = {
    "enable_model_cpu_offload": (
        False,
        "does not exist: stage 2 never loads two models at once. enable_group_offload moves weights block by block",
    ),
    "group_offload_type": (
        "block_level",
        "does not exist: one block is the smallest group. Use group_offload_blocks_per_group for larger ones",
    ),
}


def without_removed(train: Mapping[str, Any]) -> dict[str, Any]:
    """``[train]`` of an older run as it would be saved today.

    Args:
        train: its table, with the tables below it.
    """
    tables = {"objective": OBJECTIVE, "lora": LORA, "memory": MEMORY}
    return {
        key: {k: v for k, v in value.items() if k not in tables[key]} if key in tables else value
        for key, value in train.items()
    }
