"""Errors a user can cause: what was found, where, and what to do about it.

Each of them ends a command with exit code 2 and two lines on stderr (``console.run``). Any other exception is a
bug, and its traceback is shown.
"""

from __future__ import annotations

from k5cache.shared.urls import with_urls


class K5Error(Exception):
    """An error that the user can correct.

    Args:
        problem: what was found and where, one sentence without a full stop.
        fix: what to do, as an imperative; the command to run if there is one.
    """

    def __init__(self, problem: str, fix: str) -> None:
        self.problem = with_urls(problem)
        self.fix = with_urls(fix)
        super().__init__(f"{self.problem}\n{self.fix}")

    def __reduce__(self) -> tuple[type[K5Error], tuple[str, str]]:
        return type(self), (self.problem, self.fix)


class RecipeError(K5Error):
    """A recipe or an option is misspelt, has the wrong type or is out of range."""


class DatasetError(K5Error):
    """The source of images cannot be used at all. (A single bad image is skipped and reported instead.)"""


class OutputError(K5Error):
    """A command cannot write where it was told to, or what is there is not its own."""


class ModelError(K5Error):
    """A checkpoint is missing, incomplete or of another architecture."""


class HubError(K5Error):
    """The hub cannot be reached, or refuses what it is asked."""


class StoreError(K5Error):
    """An object store cannot be reached, or refuses what it is asked."""


class CacheError(K5Error):
    """A folder is not a cache, or the cache cannot be used here."""


class CacheCorrupt(CacheError):
    """Bytes of a cache are not the bytes that were written."""


class CacheStale(CacheError):
    """A cache was made by another recipe than the one asked for."""


class CacheLocked(CacheError):
    """Another process is writing this cache."""


class EngineError(K5Error):
    """An engine that spreads an encode over several processes is missing, cannot be reached or lost its workers."""


class RunError(K5Error):
    """A training run cannot start, continue or be read."""


class DoesNotFit(K5Error):
    """The plan needs more memory than there is."""
