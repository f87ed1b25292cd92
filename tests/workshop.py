"""A folder of images with captions and its cache, encoded with the toy model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from k5cache.encode.encode import encode_source
from k5cache.encode.request import EncodeOptions, EncodeReport
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.model import Drawn, ModelConfig, WantedEdit
from k5cache.store.reader import Cache, open_cache


class Workshop:
    """``put`` images, ``encode``, look at the ``cache``."""

    def __init__(self, root: Path, model: Path) -> None:
        self.source, self.root, self.model = root / "images", root / "cache", model
        self.source.mkdir(parents=True)

    def put(self, name: str, caption: str = "a cat", seed: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
        """Write an image of noise and its caption."""
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def encode(self, *drawn: str | WantedEdit, model: Path | None = None, **options: object) -> EncodeReport:
        """Encode with options of ``CacheConfig`` or ``EncodeOptions``, and prompts to draw."""
        prompts = tuple(entry for entry in drawn if isinstance(entry, str))
        edits = tuple(entry for entry in drawn if isinstance(entry, WantedEdit))
        names = {f.name for f in fields(EncodeOptions)}
        own = EncodeOptions(device="cpu", **{k: v for k, v in options.items() if k in names})
        chosen = {"resolution": 64, **{k: v for k, v in options.items() if k not in names}}
        with console.progress() as bars:
            return encode_source(
                self.source, self.root, ModelConfig(path=str(model or self.model)), CacheConfig(**chosen),
                Drawn(prompts, edits), bars, own,
            )  # fmt: skip

    @property
    def cache(self) -> Cache:
        """The cache as a trainer opens it."""
        return open_cache(self.root)

    def files(self) -> dict[str, tuple[bytes, int, int]]:
        """The bytes, mtime and inode of every file in the cache."""
        return {
            str(p.relative_to(self.root)): (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino)
            for p in sorted(self.root.rglob("*"))
            if p.is_file()
        }


class EditShop(Workshop):
    """The same for image-to-image: ``put_pair`` a source and its target, the sources in a folder of their own."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root, model)
        self.sources = root / "sources"
        self.sources.mkdir()

    def put_pair(self, name: str, instruction: str = "make it blue", seed: int = 0, **sizes: tuple[int, int]) -> Path:
        """A target of noise with its instruction, and a source of other noise; ``size`` and ``source_size``."""
        self.put_source(name, seed + 100, sizes.get("source_size", sizes.get("size", (64, 64))))
        return self.put(name, instruction, seed, sizes.get("size", (64, 64)))

    def put_source(self, name: str, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
        """A source of noise."""
        path = self.sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
        return path

    def encode(self, *edits: WantedEdit, model: Path | None = None, **options: object) -> EncodeReport:
        """Encode with options of ``CacheConfig`` or ``EncodeOptions``, and pairs to draw."""
        return super().encode(*edits, model=model, **{"source_dir": str(self.sources), **options})
