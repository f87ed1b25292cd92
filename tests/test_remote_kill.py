"""An encode to a URL that is killed with SIGKILL, wherever it was, leaves a whole cache or none, and is completed."""

from __future__ import annotations

from pathlib import Path

import pytest

from k5cache.remote.mirror import folder_of
from k5cache.shared.errors import CacheError
from k5cache.upkeep.verify import verify_cache
from tests.crash_trials import in_child
from tests.object_store import another_machine, files_of, in_store, put, rows_of
from tests.slow_link import link_to

SHARD, MANIFEST = r"^PUT .*/(latents|text)/", r"^PUT .*/manifest\.json"
POINTS = {
    "in the middle of a shard": (SHARD, 3000),
    "between the last shard and the manifest": (MANIFEST, 0),
    "in the middle of the manifest": (MANIFEST, 600),
    "before the store says that the manifest is written": (MANIFEST, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "is_new", "is_elsewhere"),
    [
        *((point, number % 2 == 0, False) for number, point in enumerate(POINTS)),
        *(pytest.param(point, number % 2 == 1, False, marks=pytest.mark.long) for number, point in enumerate(POINTS)),
        (list(POINTS)[1], False, True),
    ],
)
def test_a_killed_encode_leaves_what_was_committed_and_a_second_one_completes_it(
    server, store, shop, monkeypatch, point, is_new, is_elsewhere
):
    name = "-".join(["kill", *point.split(), str(is_new), str(is_elsewhere)]).lower()
    url, old = Path(f"s3://bucket/{name}"), {}
    if not is_new:
        put(name, files_of(shop.root))
        old = rows_of(shop.root)
        for seed in (7, 8):
            shop.put(f"{seed}.png", f"another {seed}", seed=seed)
        shop.encode(shard_mb=1)
    expected = rows_of(shop.root)

    def encode() -> None:
        shop.root = folder_of(url, is_new=True)
        shop.encode(shard_mb=1)

    with monkeypatch.context() as patch, link_to(server) as link:
        patch.setenv("AWS_ENDPOINT_URL", link.address)
        another_machine(store / "home", patch)
        link.silent_after = POINTS[point]
        child = in_child(encode)
        assert link.is_silent.wait(60), link.requests
        assert child.kill()
    another_machine(store / "other", monkeypatch)
    before = in_store(name)
    assert all(len(raw) for raw in before.values())
    rows, problem = rows_or_problem(url)
    if problem:
        assert is_new
        assert "is not a cache: it has no manifest.json" in problem or "interrupted" in problem, problem
    assert {key: rows[key] for key in old} == old
    assert rows.items() <= expected.items()
    another_machine(store / ("third" if is_elsewhere else "home"), monkeypatch)
    encode()
    another_machine(store / "fourth", monkeypatch)
    assert rows_of(url) == expected
    assert not verify_cache(folder_of(url)).problems


def rows_or_problem(url: Path) -> tuple[dict[tuple[str, str], tuple[bytes, ...]], str]:
    """The rows of a cache, or what is said when it is opened."""
    try:
        return rows_of(url), ""
    except CacheError as error:
        return {}, error.problem
