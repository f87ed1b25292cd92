"""Kills encodes at random instants, then encodes again and looks at what is there.

The encoders are loaded once, before any fork: an encode is then a tenth of a second of real arithmetic and real writes,
so that a kill falls into what matters.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from k5cache.encoders import clip, qwen, vae, vision, with_picture
from k5cache.shared import console
from k5cache.shared.errors import CacheError
from k5cache.shared.model import WantedEdit
from k5cache.store.reader import Cache
from k5cache.upkeep.verify import verify_cache
from tests.workshop import EditShop, Workshop

NUM_IMAGES = 6


def kill_encodes(
    model: Path, folder: Path, num_kills: int, patch: pytest.MonkeyPatch, kind: type[Workshop] = Workshop
) -> int:
    """Make trials until ``num_kills`` encodes were killed before their end, half of them on an empty folder and half on
    a cache that has to change.

    Args:
        kind: ``EditShop`` encodes pairs, with one more to draw.

    Returns:
        How many were killed: fewer if in twice as many trials the kill came too late.
    """
    patch.setattr(console.err, "quiet", True)
    loaders = (
        *((qwen, "load_tokenizer"), (qwen, "load_qwen"), (clip, "load_clip"), (vae, "load_vae")),
        *((with_picture, "load_processor"), (vision, "load_tower")),
    )
    for module, name in loaders:
        patch.setattr(module, name, functools.cache(getattr(module, name)))
    shop = kind(folder, model)
    put = shop.put_pair if isinstance(shop, EditShop) else shop.put
    shop.root = folder / "before"
    for i in range(NUM_IMAGES // 2):
        put(f"{i}.png", f"number {i} of all the pictures", seed=i, size=(64, 64) if i % 2 else (96, 64))
    encode(shop)
    for i in range(NUM_IMAGES // 2, NUM_IMAGES):
        put(f"{i}.png", f"number {i} of all the pictures", seed=i)
    (shop.source / "0.png").unlink()
    if isinstance(shop, EditShop):
        shop.put_source("1.png", seed=300)  # its latents and its texts are encoded again
        (shop.sources / "0.png").unlink()
    shop.root = folder / "undisturbed"
    for _ in range(2):  # the first is slower
        shutil.rmtree(shop.root, ignore_errors=True)
        started = time.monotonic()
        assert in_child(lambda: encode(shop)).wait() == 0
        duration = time.monotonic() - started
    expected = rows_of(shop.cache)
    random_delay = random.Random(0)
    num_killed = 0
    for trial in range(1, 2 * num_kills + 1):
        shop.root = folder / f"trial-{trial}"
        if trial % 2:
            shutil.copytree(folder / "before", shop.root)
        child = in_child(lambda: encode(shop))
        time.sleep(random_delay.uniform(0, duration))
        is_killed = child.kill()
        duration *= 1.05 if is_killed else 0.8  # follow the speed of the machine: about one kill in five comes too late
        num_killed += is_killed
        check_readable(shop)
        encode_again(shop, expected)
        shutil.rmtree(shop.root)
        if num_killed == num_kills:
            break
    return num_killed


def encode(shop: Workshop) -> None:
    """Encode with one row in each shard, so that there are as many commits as possible."""
    drawn = WantedEdit(str(shop.sources / "2.png"), "a fox") if isinstance(shop, EditShop) else "a fox"
    shop.encode(drawn, shard_mb=0)


def check_readable(shop: Workshop) -> None:
    """After the kill, a reader finds a finished cache with every row readable, or is told that it was interrupted."""
    try:
        cache = shop.cache
    except CacheError:
        assert not (shop.root / "manifest.json").exists() or "interrupted" in " ".join(verify_cache(shop.root).problems)
    else:
        rows_of(cache)


def encode_again(shop: Workshop, expected: dict[str, list[torch.Tensor]]) -> None:
    """Encode again without a kill: the cache is clean and has the same rows as one whose encode was never killed."""
    encode(shop)
    assert verify_cache(shop.root).problems == ()
    rows = rows_of(shop.cache)
    assert rows.keys() == expected.keys()
    for path, tensors in rows.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[path], strict=True)), path
    assert not list(shop.root.rglob(".tmp-*"))


def rows_of(cache: Cache) -> dict[str, list[torch.Tensor]]:
    """Everything that a trainer reads."""
    rows = {}
    for item in cache:
        (text,) = item["captions"]
        rows[item["path"]] = [item["mean"], item["std"], text.prompt_embeds, text.pooled]
        if cache.kind == "i2i":
            rows[f"source of {item['path']}"] = [*item["source"].values(), item["empty"].prompt_embeds]
    for edit in cache.manifest.edits:
        rows[f"to draw {edit.prompt}"] = [cache.latents(edit.source_key)["mean"], cache.text(edit.text_key).pooled]
    for prompt in cache.manifest.prompts:
        text = cache.prompt(prompt)
        rows[f"prompt {prompt}"] = [text.prompt_embeds, text.pooled]
    return rows


class Child:
    """A forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> bool:
        """Send SIGKILL; returns whether the process was still running."""
        os.kill(self.pid, signal.SIGKILL)  # safe: nobody has waited for it, so the id is not reused
        return self.wait() == -signal.SIGKILL


def in_child(work: Callable[[], object]) -> Child:
    """Do ``work`` in a forked process."""
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
