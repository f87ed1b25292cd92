"""Is a cache finished, so that it can be changed or merged?"""

from __future__ import annotations

from pathlib import Path

from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheError
from k5cache.store.manifest import IndexInfo, Manifest
from k5cache.store.notes import arguments_of


def finished_index(root: Path, manifest: Manifest) -> IndexInfo:
    """The index of a cache.

    Raises:
        CacheError: the cache has none yet.
    """
    if manifest.index is None:
        raise CacheError(
            f"{root} holds no finished index: its encode was interrupted",
            f"Finish it first: {command('k5cache', 'encode', 'SOURCE', *arguments_of(manifest.part), '-o', root)}",
        )
    return manifest.index
