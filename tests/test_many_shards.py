"""Caches of more shards than the process may open files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from k5cache.store.index import with_index
from k5cache.store.manifest import Manifest, lock, write_manifest
from k5cache.store.shards import ShardWriter
from tests.store_samples import LATENTS, TEXT, index_row, latents_row, text_row

PROGRAM = """
import resource, sys
from pathlib import Path
from k5cache.store.reader import open_cache
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.verify import verify_cache
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
one, other, merged = (Path(name) for name in sys.argv[1:])
caches = [open_cache(one) for _ in range(3)]
print(*(len(list(cache)) for cache in caches))
merge_caches([one, other], merged)
print(len(list(open_cache(merged))), len(collect(one).dropped), *verify_cache(merged).problems)
"""


def make_cache(root: Path, numbers: range) -> None:
    """A shard for each item, and two of texts, of which the items need one."""
    with lock(root):
        shards = []
        for number in numbers:
            with ShardWriter(root, "latents", LATENTS, (64, 64)) as writer:
                writer.append(latents_row(number))
                shards.append(writer.finish())
        for key in ("t-cat", "t-dog"):
            with ShardWriter(root, "text", TEXT) as writer:
                writer.append(text_row(key))
                shards.append(writer.finish())
        manifest = Manifest(recipe={"text": {}}, shards=tuple(shards), created_by={"k5cache": "0.1.0"})
        write_manifest(root, with_index(root, manifest, [index_row(number) for number in numbers]))


def test_caches_of_90_shards_are_read_merged_collected_and_verified_with_64_descriptors(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other", "merged")]
    make_cache(folders[0], range(90))
    make_cache(folders[1], range(90, 92))
    program = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["90 90 90", "92 1"]
