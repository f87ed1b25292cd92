"""How are large libraries imported? With a line before the seconds that it takes, and without the garbage collector.

They make hundreds of thousands of objects that all stay, and the collector looks at each of them many times: a fifth of
the seconds in which torch, transformers, diffusers and peft are imported.
"""

from __future__ import annotations

import gc
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
                _collector.rest()
                self.say(f"Loading {name} ...")
            run(module)

        spec.loader.exec_module = announce_and_run  # type: ignore[method-assign]
        return spec


class _Collector:
    """Python's garbage collector, while a command starts and afterwards."""

    SELDOM = (1_000_000, 10, 10)
    """Thresholds, as ``gc.set_threshold`` has them. A run makes 830,000 objects before it chooses its device."""

    def __init__(self) -> None:
        self.usual: tuple[int, int, int] | None = None
        self.is_kept = False

    def rest(self) -> None:
        """Collect seldom from now on."""
        if self.usual is None and not self.is_kept:
            self.usual = gc.get_threshold()
            gc.set_threshold(*self.SELDOM)

    def wake(self) -> None:
        """Collect as usual again."""
        if self.usual is not None:
            gc.set_threshold(*self.usual)
            self.usual = None

    def begin(self) -> None:
        """Collect as usual again, without the objects that exist now if this is the first call."""
        self.wake()
        if not self.is_kept:
            self.is_kept = True
            gc.freeze()


_collector = _Collector()


def begin_to_collect() -> None:
    """Collect garbage as usual from now on, but never look again at what a first call in the process finds.

    Whatever works long or with much memory calls it once all is imported; ``pick_device`` does so for most commands.
    What is there then is modules and functions. A collection with them takes 0.3 s, also in the middle of training. The
    first call must come before tensors are made that stay: what is in a cycle then is never given back.
    """
    _collector.begin()


@contextmanager
def announced(say: Callable[[str], object]) -> Iterator[None]:
    """Call ``say`` with a line when the first large library is imported, wherever that happens."""
    announcer = _Announcer(say)
    sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        sys.meta_path.remove(announcer)
        _collector.wake()  # the process may go on, if it is not the command's own
