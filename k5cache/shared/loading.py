"""What happens while large libraries are imported? The first is announced; what several of them read is read once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

SLOW = ("torch", "transformers", "diffusers", "peft", "datasets")
"""Libraries that take a second and more to import. No check of an argument imports one."""


class _Announcer(MetaPathFinder):
    """Stands before the finders of modules and hears of every import."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say, self.is_silent = say, any(name in sys.modules for name in SLOW)
        self.reads: list[_ReadOnce] = []

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
                self.reads.append(_ReadOnce())
            run(module)

        spec.loader.exec_module = announce_and_run  # type: ignore[method-assign]
        return spec


class _ReadOnce:
    """Has Python answer once which distribution each installed package is of, until ``end``.

    transformers and diffusers both ask as they are imported, and each answer reads the metadata of every distribution:
    0.9 s where 230 are installed.
    """

    def __init__(self) -> None:
        import importlib.metadata as metadata  # only now, as it takes 20 ms

        self._metadata, self._ask = metadata, metadata.packages_distributions
        metadata.packages_distributions = cache(self._ask)

    def end(self) -> None:
        """Ask anew from now on."""
        self._metadata.packages_distributions = self._ask


@contextmanager
def announced(say: Callable[[str], object]) -> Iterator[None]:
    """Call ``say`` with a line when the first large library is imported, wherever that happens."""
    announcer = _Announcer(say)
    sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        sys.meta_path.remove(announcer)
        for read in announcer.reads:
            read.end()
