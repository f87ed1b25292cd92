"""Where is what can be made again: ``K5_HOME``, by default ``~/.cache/k5``."""

from __future__ import annotations

import os
from pathlib import Path


def k5_home() -> Path:
    """Where what can be made again is kept: ``$K5_HOME``, by default ``~/.cache/k5``."""
    return Path(os.environ.get("K5_HOME") or Path("~/.cache/k5").expanduser())
