"""How is a command written, for a person to copy?"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
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
    return command(*_torchrun(os.environ), _program(), *sys.argv[1:], *words, **options)


def this_command_alone(*words: object, **options: object) -> str:
    """``this_command``, for one process where torchrun has started several."""
    return command(_program(), *sys.argv[1:], *words, **options)


def _program() -> str:
    program = Path(sys.argv[0])
    return program.parent.name if program.name in ("cli.py", "__main__.py") else program.name


def _torchrun(env: Mapping[str, str]) -> list[str]:
    """How torchrun was told to start this command; what it does not tell its processes is left as dots."""
    here, all_of_them = env.get("LOCAL_WORLD_SIZE", ""), env.get("WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" not in env or not here:
        return []
    return ["torchrun", *(["--nproc-per-node", here] if here == all_of_them else ["..."]), "-m"]
