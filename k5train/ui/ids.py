"""What is a folder called in a URL? By a hash of its place in the project, which no URL can turn into another path."""

from __future__ import annotations

import hashlib
import os
import re

NUM_DIGITS = 12
PATTERN = re.compile(r"[0-9a-f]{12}", re.ASCII)


def id_of(relative: str) -> str:
    """The id of what lies at ``relative`` (with ``/``) in the project."""
    return hashlib.sha256(os.fsencode(relative)).hexdigest()[:NUM_DIGITS]
