"""A source that is encoded whole and in three parts, once for all workers of a run, and what compares two caches."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from k5cache.store.manifest import Manifest, lock, read_manifest, write_manifest
from k5cache.store.notes import Part
from k5cache.store.reader import open_cache
from k5cache.upkeep.verify import verify_cache
from tests.conftest import Once, spare_the_collector
from tests.workshop import Workshop


class Seven(NamedTuple):
    """Seven images, one of them broken, one twice, one with a mask; the cache of all, and the three of parts."""

    source: Path
    whole: Path
    parts: list[Path]


def seven_in_parts(once: Once, model: Path) -> Seven:
    """Only read them: the workers share them."""
    root = once("seven_in_parts", lambda folder: _make(folder, model))
    return Seven(root / "images", root / "cache", [root / f"cache-{n}-of-3" for n in (1, 2, 3)])


def _make(folder: Path, model: Path) -> None:
    shop = Workshop(folder, model)
    for i, name in enumerate(("b/1", "b-2", "b/3", "a", "c", "d")):
        shop.put(f"{name}.png", f"cat {i % 3}\na dog", seed=i, size=(64, 96) if i % 2 else (64, 64))
    shutil.copy(shop.source / "a.png", shop.source / "a copy.png")
    (shop.source / "a copy.txt").write_text("another caption")
    shutil.copy(shop.source / "c.png", shop.source / "c.mask.png")
    (shop.source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (shop.source / "broken.txt").write_text("a broken picture")
    (shop.source / "alone.txt").write_text("no picture")
    options = {"flip": True, "caption_lines": "each", "wildcards": True}
    shop.encode("a fox", **options)
    spare_the_collector()  # torch and diffusers may have been imported just now
    encode_parts(shop, 3, "a fox", **options)


def encode_parts(shop: Workshop, of: int, *drawn: object, only: tuple[int, ...] = (), **options: object) -> list[Path]:
    """The caches of the parts, each encoded by itself."""
    whole, roots = shop.root, []
    for number in only or range(1, of + 1):
        shop.root = whole.with_name(f"cache-{number}-of-{of}")
        shop.encode(*drawn, part=Part((number,), of), **options)
        roots.append(shop.root)
    shop.root = whole
    return roots


def paths_of(roots: list[Path]) -> list[set[str]]:
    """The images of each cache."""
    return [set(open_cache(root).columns("path").column(0).to_pylist()) for root in roots]


def changed(root: Path, copy: Path, **fields: object) -> Path:
    """A copy of a cache whose manifest has other fields."""
    shutil.copytree(root, copy)
    manifest: Manifest = replace(read_manifest(root), **fields)  # type: ignore[arg-type]
    with lock(copy):
        write_manifest(copy, manifest)
    return copy


def assert_same_rows(merged: Path, whole: Path) -> None:
    """The same index, in the same order, and the same bytes of each row, prompts and pairs to draw."""
    ours, theirs = open_cache(merged), open_cache(whole)
    assert [ours.row(i) for i in range(len(ours))] == [theirs.row(i) for i in range(len(theirs))]
    for i in range(len(theirs)):
        assert _bits(ours[i]) == _bits(theirs[i]), theirs.row(i).path
    assert ours.manifest.prompts == theirs.manifest.prompts
    for raw in theirs.manifest.prompts:
        assert _bits(ours.prompt(raw)) == _bits(theirs.prompt(raw))
    assert ours.manifest.edits == theirs.manifest.edits
    assert ours.manifest.left_out == theirs.manifest.left_out
    assert verify_cache(merged).problems == ()


def _bits(value: object) -> object:
    """Tensors as lists of their bits, so that ``==`` compares them."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), list(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {name: _bits(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _bits(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
