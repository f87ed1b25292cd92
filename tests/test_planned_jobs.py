"""A plan's jobs and the cache's keys as columns: the same as lists and sets of them."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pyarrow as pa
import pytest

from k5cache.buckets import Bucket, Geometry
from k5cache.encode import planned_jobs
from k5cache.encode.job import LatentJob, SourceView, TextJob
from k5cache.encode.planned_jobs import TextColumns, at, latent_jobs_of
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRows
from k5cache.store.keys import Keys, are_in
from tests.edit_samples import pair_row
from tests.store_samples import index_row

EDIT = LatentJob("of-edit", "/a.png", Geometry(64, 64, Bucket(64, 64), 64, 64, 0, 0), "hash", is_source=True)


def test_jobs_are_made_of_rows_in_the_order_of_first_use_once_for_each_key_that_is_not_stored() -> None:
    with_source = replace(pair_row(0), source_key="l-source")
    rows = [
        index_row(1),
        with_source,
        index_row(1),
        replace(index_row(3), path="again.png", latent_key="l-1"),
        index_row(3),
    ]
    expected = [
        LatentJob(rows[0].latent_key, rows[0].path, geometry_of(rows[0]), rows[0].content_hash),
        LatentJob(with_source.latent_key, with_source.path, geometry_of(with_source), with_source.content_hash),
        LatentJob(
            "l-source", with_source.source_path or "", source_of_row(with_source),
            with_source.source_hash or "", is_source=True,
        ),
        LatentJob(rows[4].latent_key, rows[4].path, geometry_of(rows[4]), rows[4].content_hash),
        EDIT,
    ]  # fmt: skip
    edits = ["of-edit", "of-edit", "kept"]
    jobs, num_stored = latent_jobs_of(IndexRows.of(rows), edits, {"of-edit": EDIT}, {"kept", "of-another-cache"})
    assert (list(jobs), num_stored) == (expected, 1)
    assert (len(jobs), jobs[-1], list(jobs[1:3]), list(jobs.at([4, 0]))) == (
        5,
        EDIT,
        expected[1:3],
        [EDIT, expected[0]],
    )
    assert jobs == expected
    assert jobs != expected[:4]
    assert at(expected, [4, 0]) == at(jobs, [4, 0]) == [EDIT, expected[0]]
    assert pickle.loads(pickle.dumps(jobs)) == tuple(expected)  # without the rows
    fewer, num_stored = latent_jobs_of(IndexRows.of(rows), [], {}, Keys(pa.array(["l-1", "l-3"])))
    assert (list(fewer), num_stored) == (expected[1:3], 2)
    assert list(latent_jobs_of(IndexRows.of([]), [], {}, set())[0]) == []


@pytest.mark.parametrize("piece", [2, 100])
def test_texts_become_jobs_if_they_are_needed_and_not_stored_each_once(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(planned_jobs, "_PIECE", piece)
    view = SourceView("s.png", "h", EDIT.geometry)
    texts = TextColumns()
    for key, source in (("a", None), ("b", None), ("a", None), ("c", view), ("d", None), ("e", view)):
        texts.add(key, f"caption {key}", source)
    jobs, num_stored = texts.jobs(pa.array(["e", "c", "b", "a", "a", "z"]), {"b", "z", "y"})
    assert list(jobs) == [TextJob("a", "caption a"), TextJob("c", "caption c", view), TextJob("e", "caption e", view)]
    assert num_stored == 2
    assert list(TextColumns().jobs(pa.array([], pa.string()), set())[0]) == []


def test_a_column_of_keys_is_a_set() -> None:
    names = sorted(["é", "a", "b", "b", "z", "0" * 32])
    keys = Keys(pa.array(names))
    assert (len(keys), set(keys)) == (5, set(names))
    assert [name in keys for name in ("é", "a", "b", "z", "0" * 32)] == [True] * 5
    assert [name in keys for name in ("", "aa", "zz", "é ", "/")] == [False] * 5
    assert keys & {"a", "c"} == {"a"}
    assert {"a", "z"} <= keys
    assert not {"a", "y"} <= keys
    for known in (keys, set(names), frozenset[str]()):
        assert are_in(pa.array(["a", "c", "a"]), known).tolist() == [name in known for name in ("a", "c", "a")]
