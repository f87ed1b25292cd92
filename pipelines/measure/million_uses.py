"""What does one process take that uses a large cache of ``million_phases``? Each use has a process of its own.

``OF_TABLES`` read the tables alone, so the shards need not be there. ``OF_SHARDS`` need a cache that was encoded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from k5cache.store.manifest import read_manifest
from k5cache.store.reader import open_cache
from pipelines.measure.million_phases import Clock

BATCH_SIZE = 4


def texts(root: Path) -> None:
    """The lengths of all captions, as a plan of a run needs them."""
    clock = Clock()
    lengths = open_cache(root).texts().n_tokens
    clock.lap("lengths of captions", longest=int(lengths.max()))


def info(root: Path) -> None:
    """What ``k5cache info`` prints."""
    from k5cache.commands.info import _bucket_table, _fact_table

    clock, cache = Clock(), open_cache(root)
    _bucket_table(cache), _fact_table(cache)
    clock.lap("k5cache info")


def order(root: Path) -> None:
    """What a run does before its first step: split, identity of its data, order of an epoch."""
    import torch

    from k5train.data.mixture import Mixture, Source, epoch_batches
    from k5train.data.split import split_off
    from k5train.training.identity import _rows

    clock, cache = Clock(), open_cache(root)
    data = split_off(Mixture([Source(cache)]), 0.01)
    clock.lap("split off 1 %")
    _rows(cache)
    clock.lap("identity of the rows")
    pools = data.pools
    clock.lap("pools")
    batches = epoch_batches(pools, BATCH_SIZE, 0, torch.Generator().manual_seed(0))
    clock.lap("order of an epoch", batches=len(batches))
    data.row(batches[0][0])
    clock.lap("first row")


def page(root: Path) -> None:
    """The pages of the items: all, searched, filtered and sorted."""
    from k5train.ui.data.opened import Opened
    from k5train.ui.data.query import Query

    clock, opened = Clock(), Opened(open_cache(root))
    for query in (Query(), Query(q="99"), Query(sort="name"), Query(sort="size"), Query(only="several")):
        numbers, _ = opened.page(query)
        opened.cache.rows(numbers)
    clock.lap("five pages of items", buckets=len(opened.buckets))


def check_index(root: Path) -> None:
    """What ``k5cache verify`` checks of the index."""
    from k5cache.store.index import index_rows, read_index
    from k5cache.store.locations import Locations
    from k5cache.upkeep.index_problems import problems_of_rows

    clock, manifest = Clock(), read_manifest(root)
    assert manifest.index
    rows = index_rows(read_index(root, manifest.index, manifest.format))
    locations = Locations(root, manifest.locations, manifest.shards)
    num_problems = len(list(problems_of_rows(rows, manifest.kind, locations, locations.texts())))
    clock.lap("verify: the index", problems=num_problems)


def verify(root: Path) -> None:
    """``k5cache verify``."""
    from k5cache.upkeep.verify import verify_cache

    clock = Clock()
    verified = verify_cache(root)
    clock.lap("k5cache verify", rows=verified.num_rows, problems=len(verified.problems))


def gc(root: Path) -> None:
    """``k5cache gc --dry-run``."""
    from k5cache.upkeep.gc import collect

    clock = Clock()
    collect(root, dry_run=True)
    clock.lap("k5cache gc --dry-run")


USES: dict[str, Callable[[Path], None]] = {
    "texts": texts, "info": info, "order": order, "page": page, "index": check_index, "verify": verify, "gc": gc,
}  # fmt: skip
OF_TABLES = ("texts", "info", "order", "page", "index")
"""What reads the tables alone."""
OF_SHARDS = ("verify", "gc")


if __name__ == "__main__":
    USES[sys.argv[1]](Path(sys.argv[2]) / "cache")
