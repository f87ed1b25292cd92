"""How long has a run taken, earlier attempts included?"""

from __future__ import annotations

import time


class Clock:
    """Seconds that a run has taken, earlier attempts included."""

    def __init__(self, spent: float) -> None:
        self._start = time.monotonic() - spent

    def seconds(self) -> float:
        """The total until now."""
        return time.monotonic() - self._start
