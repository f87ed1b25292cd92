"""When may Ctrl-C stop a command, and what does it say? Anywhere except inside a block that must be done as a whole.

A ``KeyboardInterrupt`` may carry the sentence that ends the command: what is kept, and how to go on. ``console.run``
prints it.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from k5cache.shared import system


class _State:
    """Of the process, as signals are."""

    is_deferring = False
    is_pending = False
    has_come = False
    is_counted_once = False
    is_hurried = False
    num_counted: int | None = None
    """The signals since ``counted`` began. None outside it."""


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _State.num_counted is not None:
        _State.num_counted += 1
        return
    is_hurried = _State.is_hurried
    if _State.has_come and _State.is_counted_once and not is_hurried:
        return
    _State.has_come, _State.is_hurried = True, False
    if not _State.is_deferring or _State.is_pending or is_hurried:
        raise KeyboardInterrupt
    _State.is_pending = True


def _again_if_dropped(report: Callable[[Any], object], dropped: Any) -> None:
    """Send an interrupt again that came in a finalizer, where Python drops it. Imports run thousands of them."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        timer = threading.Timer(0.01, _again)
        timer.daemon = True
        timer.start()
    else:
        report(dropped)


def _again() -> None:
    _State.has_come = False
    system.interrupt()


@contextmanager
def installed() -> Iterator[None]:
    """Turn Ctrl-C, and the SIGTERM that a cluster sends, into ``KeyboardInterrupt`` until the end of the block.

    A signal inside ``deferred`` waits for the end of that block. A second signal does not wait. Only the main thread
    can handle signals; in others this does nothing. A signal that the parent process ignores stays ignored (nohup).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.has_come = False
    unraisable = sys.unraisablehook
    before = {number: signal.getsignal(number) for number in system.stop_signals()}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _on_signal)
    sys.unraisablehook = functools.partial(_again_if_dropped, unraisable)
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def counted_once() -> Iterator[None]:
    """Until the end of the block, take all signals for one Ctrl-C. Only ``hurry`` is a second one.

    For a process that another one starts and passes its own signals on to: a cluster sends SIGTERM to both of them.
    """
    before, _State.is_counted_once = _State.is_counted_once, True
    try:
        yield
    finally:
        _State.is_counted_once = before


def hurry() -> None:
    """Do what a second Ctrl-C does, from any thread."""
    _State.is_hurried = True
    system.interrupt()


def ignore() -> None:
    """Let no signal end this process any more: it is ending, and the one that started it waits for its exit code."""
    for number in system.stop_signals():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Until the end of the block, let signals interrupt nothing, and count them.

    Yields:
        how many have come.
    """
    _State.num_counted = 0
    try:
        yield lambda: _State.num_counted or 0
    finally:
        _State.num_counted = None


@contextmanager
def deferred() -> Iterator[None]:
    """Finish this block before a signal stops the command. Does nothing in other threads: they are not interrupted."""
    if _State.is_deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.is_deferring = True
    try:
        yield
    finally:
        is_pending = _State.is_pending
        _State.is_deferring = _State.is_pending = False
    if is_pending:
        raise KeyboardInterrupt


def is_pending() -> bool:
    """Whether a signal waits for the end of a ``deferred`` block."""
    return _State.is_pending


@contextmanager
def saying(sentence: str) -> Iterator[None]:
    """If the block is stopped and does not say itself what is kept and how to go on, say this."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if stopped.args:
            raise
        raise KeyboardInterrupt(sentence) from stopped


def is_second(stopped: KeyboardInterrupt) -> bool:
    """Whether this interrupt came while another one was being answered: then nothing more must be waited for."""
    context = stopped.__context__
    while context is not None and not isinstance(context, KeyboardInterrupt):
        context = context.__context__
    return context is not None
