"""On a GPU: rows that a background thread reads into page-locked memory are the rows of a plain read."""

from __future__ import annotations

import queue
import random
import threading
from pathlib import Path

import pytest
import torch

import k5cache
from k5cache.shared.errors import CacheError
from k5cache.store.reader import TextRow, open_cache
from tests.store_samples import make_cache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("store") / "cache"
    make_cache(cache)
    return cache


def tensors(item: dict) -> dict[str, torch.Tensor]:
    texts: tuple[TextRow, ...] = item["captions"]
    tensors_of_item = {name: item[name] for name in ("mean", "std", "mask") if item.get(name) is not None}
    for i, text in enumerate(texts):
        tensors_of_item |= {f"prompt_embeds {i}": text.prompt_embeds, f"pooled {i}": text.pooled}
    return tensors_of_item


def test_rows_read_by_a_background_thread_into_pinned_memory_are_those_of_a_plain_read(root):
    plain, pinned = open_cache(root), k5cache.open(root, pin_memory=True)
    order = [random.Random(0).randrange(len(plain)) for _ in range(200)]
    ready: queue.Queue[tuple[int, dict]] = queue.Queue(4)
    thread = threading.Thread(target=lambda: [ready.put((i, pinned[i])) for i in order], daemon=True)
    thread.start()
    for expected in order:
        i, item = ready.get(timeout=60)
        assert i == expected
        ours, theirs = tensors(item), tensors(plain[i])
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert name == "mask" or tensor.is_pinned(), name
            on_device = tensor.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            assert torch.equal(tensor, theirs[name])
            assert torch.equal(on_device.cpu(), theirs[name])
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_damage_is_named_through_pinned_memory_too(tmp_path):
    make_cache(tmp_path / "cache")
    pinned = k5cache.open(tmp_path / "cache", pin_memory=True)
    shard = next(shard for shard in pinned.manifest.shards if shard.kind == "latents")
    path = tmp_path / "cache" / shard.file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CacheError):
        list(pinned)
