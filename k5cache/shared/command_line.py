"""How is a command written, for a person to copy?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from k5cache.shared.urls import with_urls


def command(*words: object, **options: object) -> str:
    """A command line to copy, quoted for a shell. Options that are None are left out; a list repeats its option."""
    line = [str(word) for word in words]
    for name, value in options.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            line += [] if item is None else [f"--{name}", str(item)]
    return shlex.join(map(with_urls, line))


def this_command(*words: object, **options: object) -> str:
    """The command line that is running, to copy, with more words and options at its end."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name in ("cli.py", "__main__.py") else program.name
    return command(name, *sys.argv[1:], *words, **options)
