"""What of a text is a credential? It is never shown, written or sent."""

from __future__ import annotations

import netrc
import os
import re
from contextlib import suppress

SHAPES = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|\bwandb_v1_\w{16,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bBearer\s+[^\s'\"]+|(?<=://)[^/\s@]+@"
)
"""Tokens of the hub, of wandb, and of what else is used beside them; a name or password in an address."""
_VARIABLES = re.compile(r"TOKEN$|API_?KEY$|SECRET|PASSW|CREDENTIAL|ACCESS_?KEY$|PRIVATE_?KEY$")
_LEAST = 8
HIDDEN = "(hidden)"


def without_credentials(text: str, *more: str | None) -> str:
    """``text`` without this user's credentials, and without what has the shape of one.

    Args:
        more: credentials that the caller knows.
    """
    known = {value for value in (*more, *_of_this_user()) if value and len(value) >= _LEAST}
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return SHAPES.sub(lambda match: f"{HIDDEN}@" if match[0].endswith("@") else HIDDEN, text)


def _of_this_user() -> set[str]:
    """The values of variables that are named as credentials are, and what is in netrc, where wandb keeps its key."""
    values = {value for name, value in os.environ.items() if _VARIABLES.search(name.upper())}
    with suppress(OSError, RuntimeError, netrc.NetrcParseError, UnicodeDecodeError):
        path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # noqa: PTH111 (as wandb finds it)
        values |= {entry[2] for entry in netrc.netrc(path).hosts.values() if entry[2]}
    return values
