"""What is written while the next steps are computed? One piece of work at a time, in a thread of its own."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

from k5cache.shared import console
from k5cache.shared.host_memory import free_ram

MOST_COPIES = 5
"""What a state and its LoRA take, in adapters in float32: the adapter, two moments, the average and the LoRA."""
_NAME = "k5-beside"
_SECONDS_A_LOOK = 0.5  # a wait without an end cannot be interrupted on Windows


class Beside:
    """Does work beside this thread. What the work raises is raised here, at the next call.

    Args:
        is_on: whether this thread leaves the processor to others.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def has_room(self, num_bytes: int) -> bool:
        """Whether work can be done beside this thread, with so much more host memory until it is done.

        Earlier work is waited for, whose memory is free then.
        """
        self.wait()
        return self._is_on and free_ram() > 2 * num_bytes

    def begin(self, work: Callable[[], object]) -> None:
        """Have this done. Earlier work is waited for, so that files appear in their order."""
        self.wait()
        # A daemon: whoever does not wait, after a second Ctrl-C, leaves what a kill would leave.
        self._thread = Thread(target=self._do, args=(work,), name=_NAME, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what ended work has raised. Waits for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being done, and raise what it has raised."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_SECONDS_A_LOOK)
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait, and forget what earlier work has raised: this thread was stopped, or has an error to tell."""
        with suppress(Exception):
            self.wait()

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error


@atexit.register
def _leave() -> None:
    """End the process at once if work is still being done, which nobody waits for after one more Ctrl-C.

    Else Python ends the thread where a call into a library returns, which aborts the process: "FATAL: exception not
    rethrown", exit code 134.
    """
    if any(thread.name == _NAME for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        os._exit(console.STOPPED)
