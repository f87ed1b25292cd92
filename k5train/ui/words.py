"""How does a template write numbers, bytes, durations and times? The filters of all pages."""

from __future__ import annotations

import math
import time

from markupsafe import Markup

from k5cache.shared.foreign import shown
from k5cache.shared.progress import counted, rated
from k5cache.shared.units import count_of, human_bytes, human_seconds

NOTHING = "–"
_DAY = 24 * 3600


def number(value: float | None) -> str:
    """``12345`` -> ``12,345``; ``0.123456`` -> ``0.1235``; nothing -> a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING if value is None or math.isnan(value) else "infinite"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def of_bytes(value: float | None) -> str:
    """``1536`` -> ``1.5 KiB``."""
    return NOTHING if value is None else human_bytes(value)


def of_seconds(value: float | None) -> str:
    """``75`` -> ``1 min 15 s``. What a clock that was set back makes negative is 0."""
    return NOTHING if value is None or not math.isfinite(value) else human_seconds(max(0.0, value))


def when(value: float | None) -> str | Markup:
    """Seconds since 1970 -> ``today 19:45``, ``yesterday 09:12``, ``2026-11-20 19:45``, by this machine's clock."""
    if value is None:
        return NOTHING
    try:
        then, now = time.localtime(value), time.localtime()
    except (OverflowError, ValueError, OSError):
        return NOTHING
    clock, day = time.strftime("%H:%M", then), time.strftime("%Y-%m-%d", then)
    if day == time.strftime("%Y-%m-%d", now):
        day = "today"
    elif day == time.strftime("%Y-%m-%d", time.localtime(time.time() - _DAY)):
        day = "yesterday"
    exact = time.strftime("%Y-%m-%dT%H:%M:%S%z", then)
    return Markup('<time datetime="{}" title="{}">{} {}</time>').format(exact, exact.replace("T", " "), day, clock)


FILTERS = {
    "bytes": of_bytes, "seconds": of_seconds, "when": when, "number": number, "shown": shown, "count": counted,
    "rate": rated, "count_of": count_of,
}  # fmt: skip
