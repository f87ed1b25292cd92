"""Read caches whose files were changed by someone who also made every checksum right again. Run as a program.

``python -m tests.hostile_trials FOLDER FIRST COUNT`` prints what did not end in an honest read or in a sentence. It
limits its own memory, and prints each number before it tries it, so that the last one is known if it is killed.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path

import torch

from k5cache.shared.errors import K5Error
from k5cache.store.manifest import encode_document, read_manifest
from k5cache.store.reader import open_cache
from k5cache.store.shards import Shard
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from tests.store_samples import make_cache

MOST_BYTES = 1 << 29  # more than what the process has with its libraries, for a cache of 30 kB
NUMBERS = [
    b"\x00",
    b"\x01",
    b"\x7f",
    b"\x80\x80\x80\x80\x08",
    b"\xff\xff\xff\xff\x0f",
    b"\xff" * 9 + b"\x01",
    b"\x0c",
    b"\x15",
]


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """``raw`` with a few bits or bytes changed, most of them in the footer or in the first page headers."""
    changed = bytearray(raw)
    begin = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        low, high = chance.choice(((begin, len(raw) - 8), (begin, len(raw) - 8), (4, 120), (4, begin)))
        at = chance.randrange(low, max(low + 1, min(high, len(changed))))
        how = chance.random()
        if how < 0.5:
            changed[at % len(changed)] ^= 1 << chance.randrange(8)
        elif how < 0.8:
            changed[at % len(changed)] = chance.randrange(256)
        else:
            number = chance.choice(NUMBERS)
            changed[at : at + len(number)] = number
    return bytes(changed)


def sign(root: Path, files: dict[str, bytes]) -> None:
    """Write ``files`` and a manifest that has their sizes and digests."""
    document = json.loads((root / "manifest.json").read_bytes())
    for entry in (*document["shards"], document["index"], document["locations"]):
        raw = files.get(entry["file"])
        if raw is not None:
            (root / entry["file"]).write_bytes(raw)
            entry.update(num_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
            if "footer_sha256" in entry:
                footer = raw[-8 - int.from_bytes(raw[-8:-4], "little") :]
                entry["footer_sha256"] = hashlib.sha256(footer).hexdigest()
    del document["sha256"]
    (root / "manifest.json").write_bytes(encode_document(document))


def use(root: Path) -> list[str]:
    """Everything that only reads a cache. Returns the tracebacks of what is no sentence."""

    def everything() -> None:
        cache = open_cache(root)
        for i in range(len(cache)):
            cache.row(i)
        for i in range(len(cache)):
            cache[i]

    def shards() -> None:
        for info in read_manifest(root).shards:
            Shard(root, info)

    def lengths() -> None:
        open_cache(root).texts()

    wrong = []
    for action in (everything, shards, lengths, lambda: verify_cache(root), lambda: collect(root, dry_run=True)):
        try:
            action()
        except K5Error:
            pass
        except Exception:
            wrong.append(traceback.format_exc())
    return wrong


def main(folder: Path, first: int, count: int) -> None:
    """Try ``count`` caches, the same for the same numbers."""
    torch.set_num_threads(1)
    honest, root = folder / "honest", folder / "cache"
    manifest = make_cache(honest)
    assert not use(honest), "the honest cache is read"
    names = sorted(manifest.named)
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, now + MOST_BYTES))
    for number in range(first, first + count):
        print(number, flush=True)
        chance = random.Random(number)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(honest, root)
        name = chance.choice(names)
        sign(root, {name: mutated((honest / name).read_bytes(), chance)})
        for text in use(root):
            print(f"WRONG {number} {name}\n{text}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
