"""How are batches read ahead of their use? By a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace

from k5train.data.batch import Batch

LOOK_AHEAD = 4  # batches that are read ahead; one is under 10 MB at 1024x1024


def prefetch(
    read: Callable[[int], Batch], first: int, last: int, pin: bool, every: int = 1
) -> Generator[Batch, None, None]:
    """Yield ``read(first)``, ``read(first + every)`` and so on, below ``last``, read ahead by a background thread.

    An error in the thread is raised here, at the batch that it belongs to.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(LOOK_AHEAD)
    stop = threading.Event()

    def put(value: Batch | BaseException) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(value, timeout=0.1)
                return

    def work() -> None:
        try:
            for micro in range(first, last, every):
                batch = read(micro)
                put(replace(batch, groups=tuple(g.pin() for g in batch.groups)) if pin else batch)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="k5-loader", daemon=True)
    thread.start()
    try:
        for _ in range(first, last, every):
            value = ready.get()
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
