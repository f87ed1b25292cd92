"""Where are files that can always be made again? Under ``K5_HOME``, by default ``~/.cache/k5``."""

from __future__ import annotations

import os
from pathlib import Path


def k5_home() -> Path:
    """The folder of int8 bases and compiled code: ``$K5_HOME``, by default ``~/.cache/k5``."""
    return Path(os.environ.get("K5_HOME") or Path("~/.cache/k5").expanduser())
