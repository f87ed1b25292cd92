"""When may Ctrl-C stop a run? Anywhere except inside an update, so that what is saved is always a whole step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruptions:
    """Turns Ctrl-C, and the SIGTERM that a cluster sends, into ``KeyboardInterrupt``.

    A signal inside ``deferred`` waits for the end of that block. A second signal does not wait.
    """

    def __init__(self) -> None:
        self._is_deferring = False
        self._is_pending = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_deferring or self._is_pending:
            raise KeyboardInterrupt
        self._is_pending = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the end of the block. Only the main thread can; in others this does nothing."""
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
    def deferred(self) -> Iterator[None]:
        """Finish this block before a signal stops the run."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt
