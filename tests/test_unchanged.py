"""Does an encode with nothing to do open no file and ask no hub, but still notice every change?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress, TaskID

from k5cache.encode import update
from k5cache.encode.encode import encode_source
from k5cache.encode.request import EncodeOptions
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.errors import CacheStale, ModelError
from k5cache.shared.model import ModelConfig
from k5cache.sources import find, unchanged
from k5cache.sources.items import stat_numbers
from k5cache.store.manifest import read_manifest
from tests.workshop import Workshop


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, toy_model) -> Workshop:
    """Two images, one of them in a subfolder and with a mask, encoded a while after they were written."""
    shop = Workshop(tmp_path_factory.mktemp("encoded"), toy_model)
    shop.put("cat.png", "a cat", seed=0)
    shop.put("sub/owl.png", "an owl", seed=1)
    put_mask(shop, "sub/owl.mask.png", 255)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unchanged, "SETTLED_NS", 0)
        shop.encode("a fox")
    return shop


def put_mask(shop: Workshop, name: str, value: int) -> None:
    Image.fromarray(np.full((64, 64), value, np.uint8)).save(shop.source / name)


@pytest.fixture
def shop(encoded, monkeypatch) -> Workshop:
    """The same images and a copy of the cache for one test. Change only images that the test adds itself."""
    workshop = Workshop.__new__(Workshop)
    workshop.source, workshop.root, workshop.model = encoded.source, encoded.root.with_name("own"), encoded.model
    shutil.rmtree(workshop.root, ignore_errors=True)
    shutil.copytree(encoded.root, workshop.root)
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    return workshop


def refuse(monkeypatch: pytest.MonkeyPatch, target: object, name: str) -> None:
    monkeypatch.setattr(target, name, lambda *_, **__: pytest.fail(f"{name} was called"))


def test_where_no_file_was_touched_none_is_opened(shop, monkeypatch):
    refuse(monkeypatch, find, "find")
    before = shop.files()
    report = shop.encode("a fox")
    assert (report.is_unchanged, report.num_items, report.skipped) == (True, 2, ())
    assert shop.files() == before


def test_a_caption_edited_within_its_size_and_time_is_seen(shop):
    path = shop.source / "cat.txt"
    stat = path.stat()
    path.write_text("a dog", encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    try:
        report = shop.encode("a fox")
    finally:
        path.write_text("a cat", encoding="utf-8")
    assert (report.num_texts, report.num_latents, report.changed) == (1, 0, ("cat.png",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("new.png", "image"),
        ("new.psd", "picture"),
        (".new.png", "hidden"),
        ("new.mask.png", "mask"),
        ("new.txt", "text"),
        ("sub/deep/new.webp", "image"),
    ],
)
def test_a_new_file_of_any_kind_that_counts_is_seen_and_its_going_too(encoded, name, content):
    def digest() -> str:
        seen = unchanged.read_stats(encoded.source)
        assert seen
        return seen.digest

    before, path = digest(), encoded.source / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    during = digest()
    path.rename(path.with_name(f"other{path.suffix}"))
    renamed = digest()
    path.with_name(f"other{path.suffix}").unlink()
    assert len({before, during, renamed}) == 3
    if name.startswith("sub/deep/"):
        path.parent.rmdir()
    assert digest() == before


def test_another_kind_of_file_does_not_count(encoded):
    before = unchanged.read_stats(encoded.source)
    (encoded.source / "notes.md").write_text("x", encoding="utf-8")
    (encoded.source / "._cat.png").write_text("x", encoding="utf-8")
    after = unchanged.read_stats(encoded.source)
    for name in ("notes.md", "._cat.png"):
        (encoded.source / name).unlink()
    assert before == after


@pytest.mark.parametrize("kind", ["broken link", "pipe", "no folder"])
def test_what_a_stat_does_not_settle_is_left_to_who_reads(tmp_path, kind):
    source = tmp_path / "images"
    if kind != "no folder":
        source.mkdir()
        path = source / "a.png"
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(tmp_path / "nowhere")
    assert unchanged.read_stats(source) is None


def test_other_permissions_open_the_captions_and_change_nothing(shop):
    path = shop.source / "cat.txt"
    path.chmod(0o600)
    before = shop.files()
    assert shop.encode("a fox").is_unchanged
    assert shop.files() == before


def test_a_file_written_as_it_was_read_is_read_again_next_time(tmp_path, toy_model, monkeypatch):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 3_600 * 10**9)
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png")
    shop.encode()
    assert len(str(read_manifest(shop.root).source)) == 32  # the captions' and the files' digest, and no stats
    assert shop.encode().is_unchanged


def test_a_source_that_settled_meanwhile_is_noted_by_the_next_encode_that_looks_at_all_of_it(
    tmp_path, toy_model, monkeypatch
):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png")
    reports, notes = [], []
    for settled_ns in (3_600 * 10**9, 0, 0):
        monkeypatch.setattr(unchanged, "SETTLED_NS", settled_ns)
        reports.append(shop.encode(rehash=True))
        notes.append(len(str(read_manifest(shop.root).source)))
    assert [(report.num_latents, report.num_texts, report.is_unchanged) for report in reports] == [
        (1, 2, False), (0, 0, False), (0, 0, True),
    ]  # fmt: skip
    assert notes == [32, 64, 64]


def test_a_caption_edited_while_it_is_encoded_is_not_taken_for_the_one_that_was_read(tmp_path, toy_model, monkeypatch):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png", "a cat")
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    original = update.encode_texts

    def late(job, commit, jobs, failed):
        (shop.source / "cat.txt").write_text("a dog", encoding="utf-8")
        return original(job, commit, jobs, failed)

    monkeypatch.setattr(update, "encode_texts", late)
    shop.encode()
    assert len(str(read_manifest(shop.root).source)) == 32
    monkeypatch.setattr(update, "encode_texts", original)
    assert shop.encode().changed == ("cat.png",)
    assert shop.cache[0]["captions"][0].caption == "a dog"


@pytest.mark.parametrize(
    ("year", "seconds", "stored"), [(1601, -11_644_473_600, -(2**63)), (2300, 10_413_792_000, 2**63 - 1)]
)
def test_a_time_that_nanoseconds_cannot_hold_is_stored_as_the_nearest_and_counts_in_full(year, seconds, stored):
    def status(plus: int) -> SimpleNamespace:
        return SimpleNamespace(st_size=5, st_mtime_ns=seconds * 10**9 + plus, st_ctime_ns=1, st_ino=2)

    size, time, identity = stat_numbers(status(0))
    assert (size, time) == (5, stored)
    assert 0 <= identity < 2**63
    assert stat_numbers(status(1))[:2] == (size, time)
    assert stat_numbers(status(1))[2] != identity


def test_files_of_the_year_2300_are_encoded_and_their_edits_are_seen(tmp_path, toy_model):
    def date() -> None:
        for path in shop.source.iterdir():
            os.utime(path, (10_413_792_000, 10_413_792_000))

    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png", "a cat")
    put_mask(shop, "cat.mask.png", 255)
    date()
    if (shop.source / "cat.png").stat().st_mtime != 10_413_792_000:
        pytest.skip("this file system has no such time")
    assert shop.encode().num_latents == 1
    assert shop.encode().is_unchanged
    shop.put("cat.png", "a cat", seed=1)
    date()
    assert shop.encode().changed == ("cat.png",)
    (shop.source / "cat.txt").write_text("a dog", encoding="utf-8")
    date()
    assert shop.encode().num_texts == 1


# A model of the hub


@pytest.fixture
def hub(tmp_path, toy_model, monkeypatch):
    """A cache of the hub with one revision of one repository; asking the hub gives what ``hub["moved_to"]`` says."""
    home = tmp_path / "hub"
    folder = home / "models--someone--toy"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1111", encoding="utf-8")
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / "1111").symlink_to(toy_model)
    state = {"folder": folder, "moved_to": folder / "snapshots" / "1111", "asked": 0}

    def snapshot_download(repo, revision=None, allow_patterns=None):
        assert (repo, revision) == ("someone/toy", None)
        state["asked"] += 1
        return str(state["moved_to"])

    def model_info(repo, revision=None, timeout=None, files_metadata=False):
        state["asked"] += 1
        return SimpleNamespace(sha=state["moved_to"].name, siblings=())

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    api = SimpleNamespace(snapshot_download=snapshot_download, model_info=model_info)
    monkeypatch.setattr("k5cache.shared.hub.api", lambda quiet=False: api)
    return state


def encode_from_hub(shop: Workshop, **options: object):
    with console.progress() as bars:
        chosen = EncodeOptions(device="cpu", **options)
        return encode_source(
            shop.source, shop.root, ModelConfig(path="someone/toy"), CacheConfig(resolution=64), (), bars, chosen
        )


def test_the_hub_is_not_asked_while_there_is_nothing_to_encode(tmp_path, toy_model, hub):
    shop = Workshop(tmp_path / "shop", toy_model)
    shop.put("cat.png", "a cat")
    encode_from_hub(shop)
    assert hub["asked"] == 1
    assert encode_from_hub(shop).is_unchanged
    assert hub["asked"] == 1
    shop.put("dog.png", "a dog", seed=1)
    assert encode_from_hub(shop).added == ("dog.png",)
    assert hub["asked"] == 2


def test_a_revision_that_moved_is_met_when_something_is_to_be_encoded_and_then_refused_by_name(
    tmp_path, toy_model, hub
):
    shop = Workshop(tmp_path / "shop", toy_model)
    shop.put("cat.png", "a cat")
    encode_from_hub(shop)
    newer = hub["folder"] / "snapshots" / "2222"
    shutil.copytree(toy_model, newer)
    config = newer / "vae" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"scaling_factor": 0.3611', '"scaling_factor": 0.5'))
    assert "0.5" in config.read_text(encoding="utf-8")
    hub["moved_to"] = newer
    assert encode_from_hub(shop).is_unchanged
    shop.put("dog.png", "a dog", seed=1)
    with pytest.raises(CacheStale, match=r"latents\.scaling_factor is 0\.3611 in the cache, 0\.5 now"):
        encode_from_hub(shop)


def test_a_download_that_lacks_a_part_is_completed_by_the_hub(tmp_path, toy_model, hub, monkeypatch):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)  # else the second encode writes a note if it is 2 s after `put`
    shop = Workshop(tmp_path / "shop", toy_model)
    shop.put("cat.png", "a cat")
    encode_from_hub(shop)
    half = hub["folder"] / "snapshots" / "1111"
    half.unlink()
    half.mkdir()
    for part in ("tokenizer", "tokenizer_2"):
        (half / part).symlink_to(toy_model / part)
    hub["moved_to"] = toy_model
    assert encode_from_hub(shop).is_unchanged
    assert hub["asked"] == 4  # what there is, the small files, the others


def test_a_pinned_commit_is_found_under_its_own_name(hub, toy_model):
    from k5cache.shared.checkpoint import ENCODER_PARTS, folder_on_disk

    folder = folder_on_disk(ModelConfig(path="someone/toy", revision="1111"), ENCODER_PARTS)
    assert folder == hub["folder"] / "snapshots" / "1111"
    assert folder_on_disk(ModelConfig(path="someone/toy", revision="3333"), ENCODER_PARTS) is None
    assert folder_on_disk(ModelConfig(path="someone/other"), ENCODER_PARTS) is None
    assert folder_on_disk(ModelConfig(path=str(toy_model)), ENCODER_PARTS) == Path(toy_model)


def test_a_model_that_is_nowhere_is_said_so_though_a_cache_is_there(tmp_path, toy_model):
    shop = Workshop(tmp_path / "shop", toy_model)
    shop.put("cat.png", "a cat")
    shop.encode()
    with pytest.raises(ModelError, match="There is no model folder"):
        shop.encode(model=tmp_path / "gone")


# What a person sees meanwhile


class Seen(Progress):
    """Notes every task that is shown, with its total."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self.shown: list[tuple[str, float | None]] = []

    def add_task(self, description: str, *arguments: object, total: float | None = 100.0, **options: object) -> TaskID:
        self.shown.append((description, total))
        return super().add_task(description, *arguments, total=total, **options)


def test_bars_count_what_is_read_and_encoded_and_spinners_say_what_is_waited_for(tmp_path, toy_model):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png", "a cat")
    shop.put("dog.png", "a dog", seed=1)
    arguments = (shop.source, shop.root, ModelConfig(path=str(toy_model)), CacheConfig(resolution=64), ())
    first, second, third = Seen(), Seen(), Seen()
    encode_source(*arguments, first, EncodeOptions(device="cpu"))
    assert first.shown == [
        ("looking at the images and the model", None), ("hashing images", 2), ("importing torch", None),
        ("measuring this machine", None), ("loading CLIP", None), ("CLIP", 3), ("loading Qwen2.5-VL", 3), ("VAE", 2),
        ("loading the VAE", None),
    ]  # fmt: skip
    shop.put("owl.png", "a cat", seed=2)
    encode_source(*arguments, second, EncodeOptions(device="cpu"))
    assert ("hashing images", 1) in second.shown
    assert ("VAE", 1) in second.shown
    assert not [name for name, _ in second.shown if name == "CLIP"]
    encode_source(*arguments, third, EncodeOptions(device="cpu"))
    assert third.shown == []


def test_the_import_of_diffusers_is_shown_as_such(tmp_path, toy_model):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png", "a cat")
    code = (
        "import sys; from pathlib import Path; from rich.progress import Progress\n"
        "from k5cache.encode.encode import encode_source; from k5cache.encode.request import EncodeOptions\n"
        "from k5cache.options import CacheConfig; from k5cache.shared.model import ModelConfig\n"
        "from k5cache.encoders import pipeline\n"
        "bars = Progress(disable=True)\n"
        "def clean(caption):\n"
        "    print('diffusers' in sys.modules, [task.description for task in bars.tasks])\n"
        "    sys.exit()\n"
        "pipeline.clean = clean\n"
        "encode_source(Path(sys.argv[1]), Path(sys.argv[2]), ModelConfig(path=sys.argv[3]),\n"
        "              CacheConfig(resolution=64), (), bars, EncodeOptions(device='cpu'))\n"
    )
    shop.encode()  # the pipeline's facts are known on this machine
    shop.put("dog.png", "a dog", seed=1)
    command = [sys.executable, "-c", code, str(shop.source), str(shop.root), str(toy_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False ['hashing images', 'importing diffusers, which cleans captions']"
