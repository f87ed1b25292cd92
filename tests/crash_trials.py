"""Kills encodes at random instants and encodes again: run by test_crash.py in a process of its own, which forks.

usage: crash_trials.py MODEL FOLDER KILLS. Prints one JSON object. The models are loaded once, before any fork: an
encode is then a tenth of a second of real encoders and real writes, and a kill falls into what matters.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from k5cache.encoders import clip, qwen, vae
from k5cache.shared import console
from k5cache.shared.errors import CacheError
from k5cache.store.reader import Cache
from k5cache.upkeep.verify import verify_cache
from tests.workshop import Workshop

NUM_IMAGES = 6


def main(model: Path, folder: Path, num_kills: int) -> dict[str, object]:
    """Trials until so many were killed in time, half on an empty folder and half on a cache that has to change."""
    torch.set_num_threads(1)
    console.err.quiet = True
    loaders = ((qwen, "load_tokenizer"), (qwen, "load_qwen"), (clip, "load_clip"), (vae, "load_vae"))
    for module, name in loaders:
        setattr(module, name, functools.cache(getattr(module, name)))
    shop = Workshop(folder, model)
    shop.root = folder / "before"
    for i in range(NUM_IMAGES // 2):
        shop.put(f"{i}.png", f"number {i}", seed=i, size=(64, 64) if i % 2 else (96, 64))
    encode(shop)
    gc.freeze()  # the encoders' own collections then look at what is new
    for i in range(NUM_IMAGES // 2, NUM_IMAGES):
        shop.put(f"{i}.png", f"number {i}", seed=i)
    (shop.source / "0.png").unlink()
    shop.root = folder / "undisturbed"
    for _ in range(2):  # the first is slower
        shutil.rmtree(shop.root, ignore_errors=True)
        started = time.monotonic()
        in_child(lambda: encode(shop)).wait()
        duration = time.monotonic() - started
    expected = rows_of(shop.cache)
    chance = random.Random(0)
    counts = {"trials": 0, "killed": 0, "left_a_readable_cache": 0, "duration": duration}
    while counts["killed"] < num_kills and counts["trials"] < 2 * num_kills:
        counts["trials"] += 1
        trial = counts["trials"]
        shop.root = folder / f"trial-{trial}"
        if trial % 2:
            shutil.copytree(folder / "before", shop.root)
        child = in_child(lambda: encode(shop))
        time.sleep(chance.uniform(0, duration))
        is_killed = child.kill()
        duration *= 1.05 if is_killed else 0.8  # the machine may be faster or slower by now: one in five comes too late
        counts["killed"] += is_killed
        counts["left_a_readable_cache"] += opens(shop)
        again(shop, expected)
        shutil.rmtree(shop.root)
    return counts


def encode(shop: Workshop) -> None:
    """With a shard a row: as many commits as there can be."""
    shop.encode("a fox", shard_mb=0)


def opens(shop: Workshop) -> bool:
    """Whether a reader finds a finished cache after the kill; every row of it must then be readable."""
    try:
        cache = shop.cache
    except CacheError:
        assert not (shop.root / "manifest.json").exists() or "interrupted" in " ".join(verify_cache(shop.root).problems)
        return False
    rows_of(cache)
    return True


def again(shop: Workshop, expected: dict[str, list[torch.Tensor]]) -> None:
    """Encode again, undisturbed: the cache is clean and has the rows of a run that nothing disturbed."""
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
    for prompt in cache.manifest.prompts:
        text = cache.prompt(prompt)
        rows[f"prompt {prompt}"] = [text.prompt_embeds, text.pooled]
    return rows


class Child:
    """A forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """Its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> bool:
        """SIGKILL; False where it had ended before."""
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet: the id is still its own
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


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
