"""``--engine ray``: the rows of the embedded engine, by key and bytes, whatever happens to the workers."""

from __future__ import annotations

import importlib.util
import socket
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k5cache.buckets import Bucket, Geometry
from k5cache.encode.job import LatentJob, SourceView, TextJob
from k5cache.engines import choose, cluster, orders, wire
from k5cache.options import CacheConfig
from k5cache.shared.errors import DoesNotFit, EngineError, K5Error, ModelError
from k5cache.sources import find
from k5cache.sources.items import UnreadableImage
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import ShardInfo, read_manifest
from k5cache.store.shards import Shard
from k5cache.store.tensors import to_bytes
from tests.workshop import EditShop, Workshop


def needs_ray() -> None:
    """Skip without Ray, which is not imported here: it reads its variables when it is."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('Ray is not installed: pip install "kandinsky5-lora[ray]"')


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("spark", None, None, "auto"), "--engine spark is not an engine"),
        (("embedded", None, 2, "auto"), "--gpus is for --engine ray"),
        (("embedded", "auto", 2, "auto"), "--address and --gpus are for --engine ray"),
        (("ray", None, None, "cuda:1"), "--device cuda:1 is one GPU"),
        ((None, None, 2, "cpu"), "--gpus 2 and --device cpu exclude each other"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(arguments, words):
    with pytest.raises(EngineError, match=words):
        choose.engine_for(*arguments)


@pytest.mark.parametrize(("found", "words"), [(None, "not installed"), ("2.9.3", "2.9.3 is installed"), ("3.0", "3.0")])
def test_a_missing_ray_or_one_of_another_version_is_a_line_with_the_command(found, words, monkeypatch):
    monkeypatch.setattr(cluster, "version", lambda _: found)
    for arguments in (("ray", None, None, "auto"), (None, "auto", None, "auto"), (None, None, 2, "auto")):
        with pytest.raises(EngineError, match=words) as refused:
            choose.engine_for(*arguments)
        assert 'pip install "kandinsky5-lora[ray]"' in refused.value.fix


def test_more_gpus_than_there_are_are_refused_before_ray_starts(monkeypatch):
    monkeypatch.setattr(cluster, "version", lambda _: "2.60.0")
    for count in (0, -1, 99):
        with pytest.raises(K5Error, match=f"--gpus {count}"):
            choose.engine_for(None, None, count, "auto")


def test_without_options_the_passes_run_in_this_process_and_ray_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(cluster, "version", lambda _: pytest.fail("looked for"))
    assert choose.engine_for(None, None, None, "auto") is None
    assert choose.engine_for("embedded", None, None, "cuda:1") is None


def test_an_address_where_no_cluster_answers_is_named_within_bounds(monkeypatch):
    needs_ray()
    monkeypatch.setattr(cluster, "SECONDS_TO_ANSWER", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(EngineError, match=f"127.0.0.1:{port} does not answer as a Ray cluster does"):
            cluster._answering(f"127.0.0.1:{port}")
    with pytest.raises(EngineError, match=f"No Ray cluster answers at 127.0.0.1:{port}: Connection refused"):
        cluster._answering(f"127.0.0.1:{port}")
    for address in ("ray://head:10001", "head", "http://head:6379", ":6379"):
        with pytest.raises(EngineError, match="is not an address of a cluster"):
            cluster._answering(address)


# --- on a Ray of two workers ---


def on_ray(test):
    """Starts processes, which takes over 5 s, and imports libraries that warn of what they themselves do."""
    of_threads = "pytest.PytestUnhandledThreadExceptionWarning"  # Ray Data's end with SystemExit when Ray is ended
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", of_threads):
        test = pytest.mark.filterwarnings(f"ignore::{kind}")(test)
    return pytest.mark.slow(test)


@pytest.fixture(scope="module")
def two_workers():
    """One Ray for this file. Every encode below runs on two processes."""
    needs_ray()
    from k5cache.engines.ray_engine import RayEngine

    with cluster.joined(None, None, "cpu"):
        from ray._private import auto_init_hook

        assert not auto_init_hook.enable_auto_connect, "a thread that ends late would start a second Ray"
        yield RayEngine(cpu_workers=2)


def rows_of(root: Path) -> dict[tuple[str, str], tuple[object, ...]]:
    """Every stored row: its tensors' bytes, tokens and caption, by kind and key. No key is there twice."""
    rows: dict[tuple[str, str], tuple[object, ...]] = {}
    for info in read_manifest(root).shards:
        shard = Shard(root, info)
        for number, key in enumerate(shard.keys):
            row = shard.read(number, key)
            values = {name: to_bytes(tensor) for name, tensor in row.tensors.items()}
            assert (info.kind, key) not in rows
            rows[info.kind, key] = (values, row.n_tokens, row.caption)
    return rows


def described(root: Path) -> dict[str, object]:
    """What the manifest and the index say, without the names of files and the captions that were cut off: those are
    noted by the encode that writes the index, if it encoded them."""
    manifest = read_manifest(root)
    assert manifest.index
    skipped = root / "skipped.csv"
    return {
        "left out": replace(manifest.left_out, truncated=()),
        "prompts": manifest.prompts,
        "recipe": manifest.recipe,
        "edits": manifest.edits,
        "listing": manifest.source.listing,  # whether its times have settled depends on the moment
        "rows": [str(row) for row in index_rows(read_index(root, manifest.index, manifest.format))],
        "skipped": skipped.read_text(encoding="utf-8") if skipped.exists() else "",
    }


def pictures(shop: Workshop) -> None:
    """Images of three sizes, one with a mask, one broken; captions that are cut off, shared, or in several lines."""
    captions = {3: "a cat " * 40} | dict.fromkeys(range(0, 26, 5), "a shared caption")
    for i in range(26):
        caption = captions.get(i, f"a cat, number {i}\nthe {i}th cat")
        shop.put(f"{i:02}.png", caption, seed=i, size=[(64, 64), (150, 64), (64, 150)][i % 3])
    Image.fromarray(np.full((64, 64), 128, np.uint8)).save(shop.source / "00.mask.png")
    shop.put("cut.png", "cut off", seed=99)
    whole = (shop.source / "cut.png").read_bytes()
    (shop.source / "cut.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.long
@on_ray
def test_two_workers_write_the_rows_of_one_process_though_stopped_and_killed(
    two_workers, toy_model, tmp_path, monkeypatch, capsys
):
    from k5cache.engines import ray_engine, workers
    from tests.ray_workers import DiesOnce

    shop = Workshop(tmp_path, toy_model)
    pictures(shop)
    options = {"flip": True, "max_sequence_length": 32}
    truncated = shop.encode("to be drawn", **options).truncated
    assert truncated
    by_one, shop.root = shop.root, tmp_path / "by_two"

    add = ray_engine._Commits.add
    first: list[ShardInfo] = []

    def stopped(self, shards):
        add(self, shards)
        if not first and shards and shards[0].kind == "latents":
            first.extend(shards)
            raise KeyboardInterrupt

    encode_texts = ray_engine.RayPasses.encode_texts
    cut: list[tuple[str, int]] = []

    def watched(*arguments):
        cut.extend(encode_texts(*arguments))
        return tuple(cut)

    with monkeypatch.context() as patch:
        patch.setattr(ray_engine._Commits, "add", stopped)
        patch.setattr(ray_engine.RayPasses, "encode_texts", watched)
        with pytest.raises(KeyboardInterrupt):
            shop.encode("to be drawn", engine=two_workers, **options)
    assert tuple(cut) == truncated
    stopped_at = read_manifest(shop.root)
    assert stopped_at.index is None
    assert {*first} <= {*stopped_at.shards}
    num_latents = sum(shard.num_rows for shard in stopped_at.shards if shard.kind == "latents")

    monkeypatch.setattr(workers, "VaeWorker", DiesOnce)
    report = shop.encode("to be drawn", engine=two_workers, **options)
    assert (tmp_path / "died").exists()
    assert report.num_texts == 0, "they were committed"
    assert report.reused_latents == num_latents
    assert rows_of(shop.root) == rows_of(by_one)
    assert described(shop.root) == described(by_one)
    assert not list(shop.root.glob("*/.tmp-*"))
    assert "A worker died" in capsys.readouterr().err
    assert shop.encode("to be drawn", engine=None, **options).is_unchanged


@pytest.mark.long
@on_ray
def test_pairs_of_image_to_image_are_encoded_as_by_one_process(two_workers, toy_edit_model, tmp_path):
    shop = EditShop(tmp_path, toy_edit_model)
    for i in range(12):
        size = [(64, 64), (150, 64)][i % 2]
        shop.put_pair(f"{i:02}.png", f"make number {i} blue\nmake it red", seed=i, size=size, source_size=(96, 80))
    (shop.sources / "05.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    shop.encode()
    by_one, shop.root = shop.root, tmp_path / "by_two"
    shop.encode(engine=two_workers)
    assert rows_of(shop.root) == rows_of(by_one)
    assert described(shop.root) == described(by_one)


@pytest.mark.long
@on_ray
def test_an_order_that_kills_every_worker_ends_the_encode_by_name_and_what_is_committed_stays(
    two_workers, toy_model, tmp_path, monkeypatch
):
    from k5cache.engines import running, workers
    from tests.ray_workers import DiesAlways

    shop = Workshop(tmp_path, toy_model)
    shop.put("a.png")
    monkeypatch.setattr(workers, "VaeWorker", DiesAlways)
    monkeypatch.setattr(running, "MOST_ATTEMPTS", 1)
    with pytest.raises(EngineError, match=r"1 workers? died .* from a\.png on"):
        shop.encode(engine=two_workers)
    assert [shard.kind for shard in read_manifest(shop.root).shards] == ["text"]


@on_ray
def test_other_processes_read_what_is_in_a_table_or_a_tar(two_workers, tmp_path):
    import ray

    shop = Workshop(tmp_path, tmp_path)
    files = [shop.put(f"{i}.png", seed=i) for i in range(3)]
    rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(rows), tmp_path / "cats.parquet")
    for name, mode in (("cats.tar", "w"), ("packed.tar", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            for file in shop.source.iterdir():
                tar.add(file, file.name)
    for source in (shop.source, tmp_path / "cats.parquet", tmp_path / "cats.tar", tmp_path / "packed.tar"):
        listing = find.find(source, CacheConfig())
        path = listing.items[1].path
        before = listing.read(path)  # a stream is open now
        there = ray.remote(num_cpus=0)(lambda read, path: read(path)).remote(listing.read, path)
        assert ray.get(there, timeout=120) == before == (files[1] if source == shop.source else files[1].read_bytes())


@on_ray
def test_a_machine_that_does_not_see_the_cache_or_the_images_is_named_before_any_work(two_workers, tmp_path):
    from k5cache.engines.ray_engine import _look, _place

    (tmp_path / ".lock").write_text(" {}")
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "config.json").touch()
    place = _place(tmp_path, tmp_path, tmp_path / "model")
    with cluster.joined(None, None, "cpu") as joined:
        name = joined.nodes[0].name
        _look(joined, place)
        wrong = {
            "sees another folder": replace(place, lock=" {'pid': 1}"),
            "does not see the cache": replace(place, root=tmp_path / "other"),
            "does not see the images": replace(place, source=str(tmp_path / "other")),
            "does not see the model": replace(place, model=tmp_path / "other"),
            "has no folder": replace(place, folder=str(tmp_path / "other")),
            "has kandinsky5-lora": replace(place, version="0.0"),
        }
        for words, at in wrong.items():
            with pytest.raises(EngineError) as refused:
                _look(joined, at)
            assert refused.value.problem.startswith(f"{name} {words}"), words
            assert isinstance(refused.value, EngineError)
            assert not isinstance(refused.value, ModelError)
