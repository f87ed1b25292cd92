"""How are a count, a number of bytes and a duration written for a person?"""

from __future__ import annotations


def count_of(number: int, one: str, many: str = "") -> str:
    """``1`` and ``step`` -> ``1 step``; ``2000`` -> ``2,000 steps``.

    Args:
        many: what more than one of them is called, if that is not ``one`` with an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def human_bytes(num_bytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
