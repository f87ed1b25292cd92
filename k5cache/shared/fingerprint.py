"""Fingerprints: which weights, config or vocabulary are these? The content says it, in well under a second."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from k5cache.shared import system
from k5cache.shared.checkpoint import read_config
from k5cache.shared.part_files import StoredTensor, has_weights, stored_tensors, tokenizer_files
from k5cache.shared.plain import read_plain

WHOLE_BELOW = 64 * 2**20
"""Every byte is hashed if the tensors of a part have fewer bytes than this."""
PROBE_BYTES = 4096
"""One page, the least that a disk reads."""
NUM_PROBES = 8
"""Probes per tensor, evenly spaced, from its first byte to its last."""

_MOST_VOCABULARY_BYTES = 256 << 20  # of a file of a tokenizer; Qwen's has 11 MB

_SETTLED = 2_000_000_000
"""Nanoseconds after which a file that is written again has another time of modification, on every file system."""

_IRRELEVANT = frozenset({"torch_dtype", "dtype", "name_or_path", "processor_class", "chat_template", "architectures"})


class _State(NamedTuple):
    """What tells a file that was written again from the one that was read."""

    path: str
    inode: int
    size: int
    modified: int
    """Nanoseconds, of which a file system counts some millions as one."""
    changed: int
    """The same, which a copy that keeps the time of modification does not keep; on Windows that of its creation."""


_known: dict[tuple[bytes, tuple[StoredTensor, ...], tuple[_State, ...]], str] = {}
"""What this process has computed, by the files as they were: a run asks for that of its transformer more than once."""


def fingerprint(folder: Path, part: str, with_vision: bool = False, cached: str = "") -> str:
    """A hash that identifies one part of a checkpoint (``text_encoder``, ``vae``, ``tokenizer``, ...): 32 hex digits.

    For weights it covers the config without names and versions, and the name, dtype, shape and bytes of each tensor
    that is used (``part_files.is_used``): not the lm_head, and the vision tower only if ``with_vision``. A
    part under 64 MiB is read completely. In a larger part, eight pages of 4 KiB are sampled evenly from each tensor,
    and a tensor under 32 KiB is read completely. It does not matter how the tensors are spread over files.

    Sampling does not see a change that leaves every sampled page as it was, such as a few elements edited by hand in a
    large matrix, or a flipped bit. It does see training, merging, casting and quantising, which change nearly every
    element. Of Qwen2.5-VL-7B, 13 of 16,492 MB are sampled, at least 0.003 % of every tensor. This takes 0.13 s with the
    pages in memory.

    For a tokenizer it covers the files that decide ids, and for anything else (``scheduler``) the config.

    Args:
        with_vision: whether the vision tower of the text encoder is used.
        cached: the fingerprint that a cache has. The first caches have one of every tensor, used or not; if this is
            such a one, and every tensor is as it was, it is returned.

    Raises:
        ModelError: a file is missing, damaged or cut short.
    """
    of_used = _fingerprint(folder, part, stored_tensors(folder, part, with_vision) if has_weights(part) else [])
    if part == "text_encoder" and cached and cached != of_used:
        of_all = _fingerprint(folder, part, stored_tensors(folder, part, with_vision, unused=True))
        return cached if of_all == cached else of_used
    return of_used


def _fingerprint(folder: Path, part: str, tensors: list[StoredTensor]) -> str:
    config = _canonical(read_config(folder, part))
    states = tuple(map(_state, dict.fromkeys(tensor.path for tensor in tensors)))
    key = (config, tuple(tensors), states)
    if key in _known:
        return _known[key]
    digest = hashlib.sha256()
    _feed(digest, config)
    if part.startswith("tokenizer"):
        for path in tokenizer_files(folder, part):
            _feed(digest, path.name.encode(), read_plain(path, _MOST_VOCABULARY_BYTES))
    for tensor, sampled in zip(tensors, _sample(tensors), strict=True):
        _feed(digest, json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode(), sampled)
    if states and all(time.time_ns() - max(state.modified, state.changed) > _SETTLED for state in states):
        _known[key] = digest.hexdigest()[:32]
    return digest.hexdigest()[:32]


def _state(path: Path) -> _State:
    found = path.stat()
    return _State(str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _feed(digest: Any, *fields: bytes) -> None:
    """Hash each field with its length before it, so that no two lists of fields give the same bytes."""
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)


def _canonical(config: dict[str, Any]) -> bytes:
    """A config as bytes, without what changes if it is saved again: names, versions, the dtype it was loaded in."""

    def is_relevant(key: str) -> bool:
        is_private = key.startswith("_") and key != "_class_name"
        return not (is_private or key.endswith("_version") or key in _IRRELEVANT)

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if is_relevant(k)}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return json.dumps(strip(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sample(tensors: list[StoredTensor]) -> list[bytes]:
    """The sampled bytes of each tensor, or in a small part the sha256 of all of its bytes."""
    is_small = sum(t.num_bytes for t in tensors) < WHOLE_BELOW
    files = {path: system.open_bytes(path) for path in {t.path for t in tensors}}

    def read(tensor: StoredTensor) -> bytes:
        descriptor, size = files[tensor.path], tensor.num_bytes
        if is_small:
            return hashlib.sha256(system.read_at(descriptor, size, tensor.start)).digest()
        if size <= NUM_PROBES * PROBE_BYTES:
            return system.read_at(descriptor, size, tensor.start)
        starts = [(size - PROBE_BYTES) * i // (NUM_PROBES - 1) for i in range(NUM_PROBES)]
        return b"".join(system.read_at(descriptor, PROBE_BYTES, tensor.start + at) for at in starts)

    try:
        for descriptor in files.values():
            if not is_small:
                system.read_at_random(descriptor)
        if is_small:
            return [read(tensor) for tensor in tensors]
        from concurrent.futures import ThreadPoolExecutor  # imported here because it takes 10 ms

        with ThreadPoolExecutor(8) as pool:  # a cold disk answers eight reads in the time of one
            return list(pool.map(read, tensors))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
