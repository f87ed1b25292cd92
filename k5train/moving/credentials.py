"""What of another trainer's config is a credential? It is never shown and never written."""

from __future__ import annotations

import json
import re
from typing import Any

from k5cache.shared.credentials import HIDDEN as HIDDEN
from k5cache.shared.credentials import SHAPES
from k5cache.shared.foreign import shown

_KEYS = re.compile(
    r"(^|[_.-])token$|api[_-]?key|secret|passw|credential|access[_-]?key|private[_-]?key|webhook|publishing_config",
    re.IGNORECASE,
)
_HEX = re.compile(r"\b[0-9a-f]{40}\b")  # a key of wandb, and a git commit: that is a value of ``revision``
_MOST = 60


def is_credential(key: str, value: Any) -> bool:
    """Whether a key names a credential, or its value looks like one."""
    if _KEYS.search(key):
        return True
    if isinstance(value, dict):
        return any(is_credential(str(inner), v) for inner, v in value.items())
    if isinstance(value, list):
        return any(is_credential(key, entry) for entry in value)
    text = str(value)
    return bool(SHAPES.search(text) or (_HEX.search(text) and "revision" not in key))


def safe(key: str, value: Any) -> str:
    """A value in one short line, without credentials."""
    if is_credential(key, value):
        return HIDDEN
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shown(text, _MOST)
