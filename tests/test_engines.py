"""What an engine does without a Ray: it divides the work, sends it, takes reports, and says what went wrong."""

from __future__ import annotations

import socket
import subprocess
import threading
from dataclasses import replace
from subprocess import CompletedProcess
from types import SimpleNamespace

import pyarrow as pa
import pytest
from PIL import Image

from k5cache.buckets import Bucket, Geometry
from k5cache.encode.job import Job, LatentJob, SourceView, TextJob
from k5cache.engines import cluster, orders, running, wire
from k5cache.engines.running import Pass
from k5cache.options import CacheConfig
from k5cache.shared import system
from k5cache.shared.errors import DoesNotFit, EngineError
from k5cache.sources import images
from k5cache.sources.items import UnreadableImage
from k5cache.store.manifest import ShardInfo
from tests.workshop import Workshop

SHARD = ShardInfo("latents/64x64-0123456789abcdef.parquet", "latents", 2, 3, "a" * 64, "b" * 64, (64, 64))


def latent_job(number: int, side: int = 64) -> LatentJob:
    geometry = Geometry(side + number, side, Bucket(side, side), side + number, side, number // 2, 0)
    return LatentJob(f"{number:032x}", f"{number}.png", geometry, "ab")


def text_job(number: int, source: int | None = None) -> TextJob:
    view = SourceView(f"{source}.png", f"{source}", latent_job(1).geometry) if source is not None else None
    return TextJob(f"{number:032x}", f"caption {number}", view)


def test_orders_have_every_job_once_one_bucket_each_and_become_small_at_the_end():
    jobs = [latent_job(i, side) for i, side in enumerate([64, 128] * 100)]
    found = list(orders.latent_orders(jobs, num_workers=2, most_rows=40))
    assert sorted(job.key for order in found for job in order) == sorted(job.key for job in jobs)
    assert all(len({job.geometry.bucket for job in order}) == 1 for order in found)
    sizes = [len(order) for order in found]
    assert sizes[:2] == [40, 40]
    assert sizes[-1] <= orders.LEAST_ROWS
    pixels = orders.latent_orders(jobs, 2, 40, pixel_bytes=5 * 3 * 64 * 64)
    assert max(len(order) for order in pixels if order[0].geometry.bucket.width == 64) == 5


def test_the_pixels_of_all_orders_take_a_quarter_of_the_memory_of_ray_and_have_a_bound():
    for num_workers, num_machines in ((1, 1), (2, 1), (8, 1), (16, 4)):
        of_an_order = orders.pixel_bytes(num_workers, num_machines, 7 * 2**30)
        allowed = orders.bytes_to_allow(of_an_order, num_workers, num_machines)
        assert 7 * 2**29 - 1000 <= allowed <= 7 * 2**29, "of which Ray Data gives half to those that decode"
    assert orders.pixel_bytes(2, 1, 75 * 2**30) == 2**29
    assert orders.bytes_to_allow(2**29, 2, 1) == 8 * 2**30, "and not 37 GiB"
    assert orders.bytes_to_allow(0, 2, 1) == 0


def test_orders_of_texts_keep_those_of_a_source_together():
    jobs = [text_job(i, source=i // 3) for i in range(60)]
    found = list(orders.text_orders(jobs, num_workers=2, most_rows=10))
    assert [job for order in found for job in order] == jobs
    sources = [{job.source for job in order} for order in found]
    assert not any(a & b for i, a in enumerate(sources) for b in sources[i + 1 :])
    assert [len(order) for order in orders.text_orders([text_job(i) for i in range(30)], 2, 100, is_guided=False)] == [
        15,
        15,
    ]


def test_jobs_and_reports_travel_as_they_are():
    jobs = [latent_job(3), replace(latent_job(4), is_source=True)]
    assert [wire.latent_job(wire.json_of(job)) for job in jobs] == jobs
    texts = [text_job(1), text_job(2, source=7), TextJob("k", "né [x] \ud800")]
    assert [wire.text_job(wire.json_of(job)) for job in texts] == texts
    shard = ShardInfo("latents/64x64-0123456789abcdef.parquet", "latents", 2, 3, "a" * 64, "b" * 64, (64, 64))
    report = wire.Report(5, (shard,), {}, (("a", 2),), ("red",), ("note",))
    assert wire.report_of(wire.json_of_report(report)) == report
    for is_lasting in (True, False):
        sent = wire.failure_of(wire.json_of_failure(UnreadableImage("is cut off", has_changed=not is_lasting)))
        assert (sent.reason, sent.is_lasting) == ("is cut off", is_lasting)
    for error in (DoesNotFit("a", "b"), OSError(28, "No space left on device", "/x")):
        sent = wire.report_of(wire.json_of_report(wire.Report(0, error=error))).error
        assert (type(sent), str(sent)) == (type(error), str(error))


def test_an_error_of_ray_is_what_was_raised_in_one_line_without_a_traceback():
    dead = "The actor died in its creation task, \x1b[36mray::Worker.__init__()\x1b[39m (pid=1)\n  File x, line 2\n"
    assert cluster.words_of(dead + "ModuleNotFoundError: No module named 'k5cache'\n") == "No module named 'k5cache'"
    versions = "Traceback\n  raise\nRuntimeError: Version mismatch: the cluster has:\n    Ray: 2.50\n    Python: 3.12\n"
    assert cluster.words_of(versions) == "Version mismatch: the cluster has: Ray: 2.50 Python: 3.12"
    assert cluster.words_of("\x1b[36mThe node died\x1b[39m\nsome details") == "The node died"


def test_a_cluster_that_wants_a_token_is_joined_with_it_or_says_so(monkeypatch):
    answers = iter(
        [
            CompletedProcess([], 0, "10.0.0.1:6379\n10.0.0.1:6379\ntoken 10.0.0.1:6379\n", "a warning"),
            CompletedProcess([], 1, "10.0.0.1:6379\n", "Traceback\nray.exceptions.AuthenticationError: RPC error\n"),
        ]
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: next(answers))
    assert cluster._answering("auto") == ("10.0.0.1:6379", "token")
    with pytest.raises(EngineError, match=r"auto, which is 10\.0\.0\.1:6379 wants a token"):
        cluster._answering("auto")


def test_a_process_of_ray_that_has_ended_does_not_listen(tmp_path):
    path = str(tmp_path / "socket")
    assert not system.is_heard(socket.AF_UNIX, path, 10)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        assert system.is_heard(socket.AF_UNIX, path, 10)
    assert not system.is_heard(socket.AF_UNIX, path, 10)


def test_workers_that_die_are_told_once_and_named_if_it_is_always_the_same_images(capsys):
    work = Pass([7], ["a.png"], "image", lambda count: None)
    for _ in range(2):
        work.begun({0: [1]}, "decoded")
        work.begun({0: [1, 2]}, "decoded")
    assert capsys.readouterr().err.count("A worker died. The 7 images that it had are decoded again") == 1
    with pytest.raises(EngineError, match=r"3 workers died .* while they decoded 7 images from a\.png on"):
        work.begun({0: [1, 2, 3, 4]}, "decoded")


def test_what_is_reported_is_committed_in_time_though_no_other_report_comes(monkeypatch):
    from k5cache.engines import ray_engine

    named: list[ShardInfo] = []
    commits = ray_engine._Commits(SimpleNamespace(add=named.extend))
    commits.add([SHARD])
    assert not named
    monkeypatch.setattr(ray_engine, "SECONDS_A_COMMIT", 0.0)
    commits.look()
    assert named == [SHARD]
    commits.look()
    assert named == [SHARD]


@pytest.mark.parametrize(
    ("error", "missing", "is_stopped"),
    [(None, "", False), (KeyboardInterrupt(), "", True), (EngineError("a", "b"), "the head", False)],
)
def test_ray_data_is_stopped_before_ray_unless_it_has_ended_or_ray_has(error, missing, is_stopped, monkeypatch):
    is_shut_down = threading.Event()

    class StreamingExecutor(threading.Thread):
        """As Ray Data has one for each dataset that it executes."""

        def shutdown(self, force: bool) -> None:
            assert force
            is_shut_down.set()

        def run(self) -> None:
            is_shut_down.wait(60)

    def batches(**_):
        StreamingExecutor(daemon=True).start()
        is_begun.set()
        is_shut_down.wait(60)
        yield from ()

    is_begun = threading.Event()
    of_another = StreamingExecutor(daemon=True)
    of_another.shutdown = lambda force: pytest.fail("it is of another dataset")
    of_another.start()
    monkeypatch.setattr(running, "_alive", dict)
    monkeypatch.setattr(cluster, "missing", lambda: missing)
    work = Pass([1], ["a.png"], "image", lambda count: None)
    entered = running.Running(SimpleNamespace(iter_batches=batches), None, work).__enter__()
    assert is_begun.wait(60)
    entered.__exit__(type(error) if error else None, error, None)
    assert is_shut_down.is_set() == is_stopped
    is_shut_down.set()


def test_a_worker_that_fails_reports_the_shards_that_it_has_finished(tmp_path, monkeypatch):
    from k5cache.engines import workers

    class Fails(workers._Worker):
        def encode(self, job: Job, sink: workers.Shards, order: workers.Order) -> wire.Report:
            sink.add([SHARD])
            raise OSError(28, "No space left on device", "/cache")

    job = SimpleNamespace(root=tmp_path, config=CacheConfig(), device="cpu", vram=None)
    monkeypatch.setattr(workers, "job_of", lambda *_: job)
    monkeypatch.setattr(workers, "_note", lambda *_: None)
    ledger = SimpleNamespace(begin=None, tell=None)
    (answer,) = Fails(None, None, ledger)(pa.table({"order": [4], "jobs": [["", ""]]}))
    report = wire.report_of(answer["report"][0].as_py())
    assert (report.order, report.shards, report.error.errno) == (4, (SHARD,), 28)


def test_a_command_whose_stderr_is_closed_starts_ray_too(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with cluster._nothing_printed():
        pass


class Starts(Exception):
    """An engine was started."""


class FakeEngine:
    """Says that it was started."""

    def opened(self, *_):
        raise Starts


def test_an_engine_starts_only_when_something_is_to_be_encoded(toy_model, tmp_path):
    shop, engine = Workshop(tmp_path, toy_model), FakeEngine()
    for i, name in enumerate(("cat", "dog")):
        shop.put(f"{name}.png", seed=i)
    shop.encode()
    (shop.source / "cat.png").touch()
    assert shop.encode(engine=engine).num_items == 2
    Image.new("L", (64, 64), 9).save(shop.source / "cat.mask.png")
    assert shop.encode(engine=engine).changed == ("cat.png",)
    (shop.source / "dog.png").unlink()
    assert shop.encode(engine=engine).removed == ("dog.png",)
    for option in ("rehash", "repair"):
        assert shop.encode(engine=engine, **{option: True}).num_items == 1
    (shop.source / "cat.txt").write_text("a new caption", encoding="utf-8")
    with pytest.raises(Starts):
        shop.encode(engine=engine)


def test_an_engine_starts_before_a_first_encode_reads_its_images(toy_model, tmp_path, monkeypatch):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png")
    monkeypatch.setattr(images, "hash_content", lambda _: pytest.fail("it was read"))
    with pytest.raises(Starts):
        shop.encode(engine=FakeEngine())
