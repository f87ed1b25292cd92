"""What does a user read while a large library is imported? Its name, before the seconds that it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

SLOW = ("torch", "transformers", "diffusers", "peft", "datasets")
"""Libraries that take a second and more to import. No check of an argument imports one."""


class _Announcer(MetaPathFinder):
    """Stands before the finders of modules and hears of every import."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say, self.is_silent = say, any(name in sys.modules for name in SLOW)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What Python finds. A library that is only looked for, and not imported, is not announced."""
        spec = PathFinder.find_spec(name, path, target) if name in SLOW and not self.is_silent else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def announce_and_run(module: ModuleType) -> None:
            if not self.is_silent:
                self.is_silent = True
                self.say(f"Loading {name} ...")
            run(module)

        spec.loader.exec_module = announce_and_run  # type: ignore[method-assign]
        return spec


@contextmanager
def announced(say: Callable[[str], object]) -> Iterator[None]:
    """Call ``say`` with a line when the first large library is imported, wherever that happens."""
    announcer = _Announcer(say)
    sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        sys.meta_path.remove(announcer)
