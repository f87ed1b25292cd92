"""What does one check say? What was found, what that means for this user, a mark, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Mark = Literal["good", "look at this", "does not work"]


@dataclass(frozen=True)
class Check:
    """One line of the report. Commands are for the user to copy."""

    name: str
    mark: Mark
    found: str
    meaning: str = ""
    commands: tuple[str, ...] = ()


def attempt(name: str, judge: Callable[[], Check]) -> Check:
    """The check that ``judge`` makes. If it fails, the report says why and goes on."""
    try:
        return judge()
    # Whatever is wrong with a machine must not end the report that is to find it.
    except Exception as error:
        return unchecked(name, reason_of(error))


def unchecked(name: str, reason: str) -> Check:
    """The check that could not be made."""
    return Check(name, "look at this", f"could not be checked: {reason}")


def environment(name: str, value: str = "", is_windows: bool = os.name == "nt") -> str:
    """The command that sets a variable in the shell that is open; without a value, the one that removes it."""
    if is_windows:
        return f"set {name}={value}"
    return f"export {name}={value}" if value else f"unset {name}"


def reason_of(error: Exception) -> str:
    """An error in one line."""
    words = (str(error).strip() or "no message").splitlines()[0][:200]
    return f"{type(error).__name__}: {words}"
