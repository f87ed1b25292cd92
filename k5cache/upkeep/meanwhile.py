"""Was a cache written while it was read? Then a file that is missing is not damage: there is a newer one."""

from __future__ import annotations

from pathlib import Path

from k5cache.shared.errors import CacheError
from k5cache.store.manifest import Manifest, read_manifest


def was_replaced(root: Path, manifest: Manifest) -> bool:
    """Whether a writer has replaced files that ``manifest`` names since it was read: the index, or shards.

    New shards alone are no reason to read a cache again, since an encode adds some every few seconds.
    """
    try:
        return not manifest.named <= read_manifest(root).named
    except CacheError:
        return False
