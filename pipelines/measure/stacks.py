"""Where does a process spend its time? Looks at the stack of its main thread fifty times a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

EVERY = 0.02  # seconds
_OURS = ("k5cache", "k5train", "pipelines")


def sample(path: Path) -> None:
    """Write a line for each look at the main thread to ``path``, from now to the end of the process.

    A line has the seconds since then, and the function of each of our packages that is on the stack, outermost first.
    """
    begin, main = time.monotonic(), threading.main_thread().ident
    out = path.open("w", encoding="utf-8", buffering=1)  # a line at a time: the process may be killed

    def look() -> None:
        while True:
            time.sleep(EVERY)
            places = _places(sys._current_frames().get(main or 0))
            out.write(f"{time.monotonic() - begin:.3f}\t{' '.join(places)}\n")

    threading.Thread(target=look, daemon=True).start()


def _places(frame: FrameType | None) -> list[str]:
    places = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _OURS:
            places.append(f"{module}:{frame.f_code.co_name}")
        frame = frame.f_back
    return places[::-1]


def longest(lines: Iterable[str], count: int) -> list[tuple[str, float]]:
    """The innermost places of ours that took longest, and their seconds; "other" is all before our code runs."""
    seconds: dict[str, float] = {}
    before = 0.0
    for line in lines:
        at, _, places = line.rstrip("\n").partition("\t")
        place = places.rpartition(" ")[2] or "other"
        seconds[place] = seconds.get(place, 0.0) + float(at) - before
        before = float(at)
    return sorted(seconds.items(), key=lambda item: -item[1])[:count]
