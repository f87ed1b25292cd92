"""When may Ctrl-C stop a run? Anywhere but inside an update, so that what is then saved is a step, whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruptions:
    """Ctrl-C, and SIGTERM as a cluster sends it, rise as ``KeyboardInterrupt``; inside ``held`` they wait for its end.

    A second one does not wait.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._waits = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_held or self._waits:
            raise KeyboardInterrupt
        self._waits = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Answer the signals here until the end of the block; other threads than the main one cannot, and do not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish this block first."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._waits:
            self._waits = False
            raise KeyboardInterrupt
