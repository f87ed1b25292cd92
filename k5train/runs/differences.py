"""In which fields do two JSON documents differ, such as two recipes?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def differences(before: Any, now: Any, free: Iterable[str] = (), where: str = "") -> list[str]:
    """The fields that differ between two JSON documents, a line for each: ``train.lora.rank: 8, now 16``.

    Args:
        free: dotted fields that may differ, with everything below them.
        where: the dotted field at which the documents are.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        names = {key: f"{where}.{key}".lstrip(".") for key in keys}
        free = set(free)
        return [
            line
            for key, name in names.items()
            if name not in free
            for line in differences(before.get(key), now.get(key), free, name)
        ]
    return [] if before == now else [f"{where}: {_shown(before)}, now {_shown(now)}"]


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
