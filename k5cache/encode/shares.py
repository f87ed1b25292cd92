"""Which images of a source are of this part? A pure function of their bytes, so that no image moves when others come.

An image's part follows from its size and three samples of its bytes: what is of another part is not read whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from k5cache.encode.request import ListedRequest
from k5cache.shared.errors import CacheError
from k5cache.sources.decode import errors_as_reasons, stream
from k5cache.sources.find import Source
from k5cache.sources.images import num_workers
from k5cache.sources.items import Content, SourceItem, UnreadableImage
from k5cache.store.split import Numbers, columns_of, hash_of, path_hashes, read_split, table_of

SAMPLE_BYTES = 16 * 1024
"""Read at the beginning, in the middle and at the end of an image: uncompressed frames of a film may begin alike."""
_BATCH = 1024  # images that are on their way to the threads at once
_UNREADABLE = 0  # as the hash of a file's stat: it equals none, so that the next encode tries again


def own_share(request: ListedRequest, rehash: bool, bars: Progress | None) -> tuple[ListedRequest, pa.Table | None]:
    """The request with only the images of its part, and the split of the whole source.

    An image whose stat is the one in the last split is not opened.

    Args:
        rehash: open every image.
    """
    part = request.manifest.part
    if part is None:
        return request, None
    listing = request.listing
    columns = _columns(listing, None if rehash else _last_split(request), bars)
    is_ours = columns[2] % np.uint64(part.of) + np.uint64(1) == np.uint64(part.numbers[0])
    items = [listing.items[i] for i in np.flatnonzero(is_ours)]
    return replace(request, listing=replace(listing, items=items)), table_of(columns)


def sample(content: Content) -> int:
    """A hash of an image's size and of samples of its bytes: 64 bits.

    Raises:
        UnreadableImage: it cannot be opened or read.
    """
    with errors_as_reasons(), stream(content) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
        for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            file.seek(max(0, start))
            digest.update(file.read(SAMPLE_BYTES))
    return int.from_bytes(digest.digest(), "little")


def _last_split(request: ListedRequest) -> pa.Table | None:
    info = request.manifest.split
    try:
        return read_split(request.root, info) if info else None
    except CacheError:  # it is damaged: the images are looked at again
        return None


def _columns(listing: Source, last: pa.Table | None, bars: Progress | None) -> list[Numbers]:
    """The columns of the split of a source."""
    items = listing.items
    paths = path_hashes(item.path for item in items)
    files = np.fromiter((hash_of(item.path, item.num_bytes, item.mtime_ns, item.inode) for item in items), np.uint64)
    contents, unknown = _known_contents(files, last)
    samples = _samples(listing, [items[i] for i in unknown], bars)
    for i, (content, is_readable) in zip(unknown, samples, strict=True):
        contents[i] = content
        if not is_readable:
            files[i] = _UNREADABLE
    return [paths, files, contents]


def _known_contents(files: Numbers, last: pa.Table | None) -> tuple[Numbers, Sequence[int]]:
    """The contents of the files that the last split has, and which files it does not have."""
    contents = np.zeros(len(files), np.uint64)
    if last is None or not last.num_rows:
        return contents, range(len(files))
    _, last_files, last_contents = columns_of(last)
    order = np.argsort(last_files)
    places = np.minimum(np.searchsorted(last_files, files, sorter=order), len(order) - 1)
    found = order[places]
    is_known = last_files[found] == files
    contents[is_known] = last_contents[found[is_known]]
    return contents, np.flatnonzero(~is_known).tolist()


def _samples(listing: Source, items: Sequence[SourceItem], bars: Progress | None) -> Iterator[tuple[int, bool]]:
    """(``sample``, whether it could be read) of each image. If it cannot be read, its path decides to which part it
    belongs."""
    if not items:
        return
    task = bars.add_task("sharing out images", total=len(items), unit="image", note="") if bars else None
    with ThreadPoolExecutor(num_workers(), thread_name_prefix="k5-share") as pool:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            yield from pool.map(partial(_sample_or_path, listing), batch)
            if bars and task is not None:
                bars.advance(task, len(batch))
    if bars and task is not None:
        bars.remove_task(task)


def _sample_or_path(listing: Source, item: SourceItem) -> tuple[int, bool]:
    try:
        return sample(listing.read(item.path)), True
    except UnreadableImage:
        return hash_of(item.path), False
