"""``--engine ray``: the rows of the embedded engine, by key and bytes, whatever happens to the workers."""

from __future__ import annotations

import functools
import importlib.util
import socket
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.progress import Progress

from k5cache.buckets import Bucket, cover
from k5cache.encode import image_pass, text_pass
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.engines import choose, cluster
from k5cache.options import CacheConfig
from k5cache.shared.errors import EngineError, K5Error, ModelError
from k5cache.sources import find
from k5cache.sources.images import hash_content
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import Manifest, ShardInfo, lock, read_manifest
from k5cache.store.shards import Shard
from k5cache.store.tensors import to_bytes
from tests.workshop import EditShop, Workshop

if TYPE_CHECKING:
    from k5cache.engines.ray_engine import RayEngine


def needs_ray() -> None:
    """Skip without Ray, which is not imported here: it reads its variables when it is."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('Ray is not installed: pip install "kandinsky5-lora[ray]"')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("spark", None, None, "auto"), "--engine spark is not an engine"),
        (("embedded", None, 2, "auto"), "--gpus is for --engine ray"),
        (("embedded", "auto", 2, "auto"), "--address and --gpus are for --engine ray"),
        (("ray", None, None, "cuda:1"), "--device cuda:1 is one GPU"),
        ((None, None, 2, "cpu"), "--gpus 2 and --device cpu exclude each other"),
        (("ray", "", None, "auto"), "--address is empty"),
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
    with socket.create_server(("127.0.0.1", 0)) as listening, monkeypatch.context() as patch:
        port = listening.getsockname()[1]
        patch.setattr(cluster, "SECONDS_TO_ANSWER", 4.0)
        with pytest.raises(EngineError, match=f"127.0.0.1:{port} does not answer as a Ray cluster does"):
            cluster._answering(f"127.0.0.1:{port}")
    with pytest.raises(EngineError, match=f"No Ray cluster answers at 127.0.0.1:{port}: Connection refused"):
        cluster._answering(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")  # as a Ray that was killed leaves its own in a file
    with pytest.raises(EngineError, match=rf"answers at auto, which is [\d.]+:{port}: Connection refused"):
        cluster._answering("auto")
    for address in ("ray://head:10001", "head", "http://head:6379", ":6379", "head:65536"):
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
    """One Ray for this file. Every encode below runs on two processes. Ray believes that there are two GPUs."""
    needs_ray()
    from k5cache.engines.ray_engine import RayEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_start", lambda _, start=cluster._start: start(2))
        stack = ExitStack()
        stack.enter_context(cluster.joined(None, None, "cpu"))
    with stack:
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


@pytest.fixture
def small(tmp_path, monkeypatch) -> Workshop:
    """A shop whose encoders are arithmetic, here and in workers. Those of the tests marked ``long`` are real ones."""
    from k5cache.engines import workers
    from tests import ray_workers

    for owner, functions in ray_workers.small_encoders().items():
        for name, function in functions.items():
            monkeypatch.setattr(owner, name, function)
    monkeypatch.setattr(workers, "TextWorker", ray_workers.SmallText)
    monkeypatch.setattr(workers, "VaeWorker", ray_workers.SmallVae)
    return Workshop(tmp_path, ray_workers.write_configs(tmp_path / "model"))


@contextmanager
def passes_of(engine: RayEngine | None, shop: Workshop) -> Iterator[tuple[Any, Job, Committer]]:
    """The passes of an engine, None for the embedded one, with a job and a sink that write into ``shop.root``."""
    config = CacheConfig(resolution=64, max_sequence_length=16)
    job = Job(functools.partial(Path, shop.source), shop.root, shop.model, config, "cpu", Progress(disable=True))
    with lock(shop.root):
        sink = Committer(shop.root, Manifest(recipe={}), shard_bytes=2**14)
        if engine is None:
            yield (
                SimpleNamespace(encode_texts=text_pass.encode_texts, encode_latents=image_pass.encode_latents),
                job,
                sink,
            )
        else:
            device = "auto" if engine.gpus else "cpu"
            with engine.opened(shop.source, shop.root, shop.model, device, job.bars) as passes:
                yield passes, job, sink


@on_ray
def test_workers_write_the_captions_of_one_process_though_one_is_killed(two_workers, small, tmp_path, capsys):
    texts = [TextJob(f"{i:032x}", "caption " * (i % 3) + str(i)) for i in range(40)]
    with passes_of(None, small) as (passes, job, sink):
        cut = passes.encode_texts(job, sink, texts, {})
    by_one, small.root = small.root, tmp_path / "by_two"
    with passes_of(two_workers, small) as (passes, job, sink):
        passes.announce(job, texts, [])
        assert passes.encode_texts(job, sink, texts, {}) == cut != ()
    assert (tmp_path / "died").exists()
    assert "A worker died" in capsys.readouterr().err
    rows = rows_of(small.root)
    assert rows == rows_of(by_one)
    assert len({str(values) for values, _, _ in rows.values()}) == len(rows) == 40
    assert not list(small.root.glob("*/.tmp-*"))


@on_ray
@pytest.mark.parametrize("on_gpus", [pytest.param(False, marks=pytest.mark.long), True])
def test_workers_write_the_latents_of_one_process_without_an_image_that_has_changed(
    two_workers, small, tmp_path, on_gpus, monkeypatch
):
    from k5cache.engines import workers
    from k5cache.engines.ray_engine import RayEngine, RayPasses
    from tests.ray_workers import FirstIsLate

    engine = two_workers
    if on_gpus:  # Ray gives each worker a GPU that is not there, and it computes on the processor
        engine = RayEngine(gpus=2)
        monkeypatch.setattr(RayPasses, "device", "cpu")
        monkeypatch.setattr(workers, "Decoder", FirstIsLate)
    files = [small.put(f"{i:02}.png", seed=i, size=(100, 80)) for i in range(26)]
    images = [
        LatentJob(f"{i:032x}", file.name, cover(100, 80, Bucket(128 if i % 3 else 64, 64)), hash_content(file))
        for i, file in enumerate(files)
    ]
    small.put("07.png", seed=99, size=(100, 80))
    with passes_of(None, small) as (passes, job, sink):
        failed = passes.encode_latents(job, sink, images)
    by_one, small.root = small.root, tmp_path / "by_two"
    with passes_of(engine, small) as (passes, job, sink):
        passes.announce(job, [], images)
        failed_too = passes.encode_latents(job, sink, images)
    rows = rows_of(small.root)
    assert rows == rows_of(by_one)
    assert len({str(values) for values, _, _ in rows.values()}) == len(rows) == 25
    assert [(key, error.reason, error.is_lasting) for key, error in failed_too.items()] == [
        (images[7].key, failed[images[7].key].reason, False)
    ]
    begun = (tmp_path / "begun").read_text().split()
    assert "0" in begun[:2], "a large order that is decoded late is not left for the end"
    assert sorted(begun) == ["0", "1", "2", "3", "4"]
    assert not list(small.root.glob("*/.tmp-*"))


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
