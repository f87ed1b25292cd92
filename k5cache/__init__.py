"""k5cache: images and captions in, a cache of latents and text embeddings out. ``k5cache.open(path)`` reads one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k5cache.store.reader import open_cache as open

__all__ = ["open"]


def __getattr__(name: str) -> Any:
    if name == "open":  # on first use: `import k5cache` alone loads neither pyarrow nor torch
        from k5cache.store.reader import open_cache

        return open_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
