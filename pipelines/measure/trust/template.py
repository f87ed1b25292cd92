"""With what does every trial begin? Pictures, caches in several states, and runs of the toy checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.measure.trust.trial import must
from tests import failing_calls
from tests.store_samples import flip

SIZES = ((64, 64), (96, 64), (64, 96), (64, 80))  # a bucket each, and so a shard and a commit each
ENCODE = ("--device", "cpu", "--set", "cache.resolution=64", "--set", "cache.shard_mb=1")
TINY = {
    "checkpoint_every": 1, "device": "cpu", "lora.rank": 2, "lora.alpha": 2, "lora.targets": '["to_query", "to_value"]',
    "optim.lr": 0.01, "optim.warmup_steps": 1, "batch_size": 2,
}  # fmt: skip
EXACT = {"base_model_precision": "no_change", "mixed_precision": "fp32"}
INT8 = {"base_model_precision": "int8-quanto", "mixed_precision": "bf16"}


def options(**values: object) -> tuple[str, ...]:
    """``--set`` for options of ``[train]``; ``__`` stands for the point in a name."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    return tuple(word for name, value in named.items() for word in ("--set", f"train.{name}={value}"))


EMA = options(**TINY, **EXACT, steps=4, optim__ema_decay=0.9, lora__dropout=0.1, checkpoints_total_limit=2)
INT8_RUN = options(**TINY, **INT8, steps=3)


def make(template: Path, model: Path) -> None:
    """Fill the template. Everything in it is whole, except what its name says."""
    failing_calls.make_template(template, model)
    encode = ("k5cache", "encode", "pictures", "--model", str(model), *ENCODE, "-o")
    for i in range(3):
        _put(template / "pictures", i)
    must(template, *encode, "cache/before")
    shutil.copytree(template / "cache" / "before", template / "cache" / "garbage")
    for part, numbers in (("half-a", (0, 1, 2)), ("half-b", (3, 4, 5))):
        for i in numbers:
            _put(template / part, i)
        must(template, "k5cache", "encode", part, "--model", str(model), *ENCODE, "-o", f"cache/{part}")
    (template / "pictures" / "0.png").unlink()
    for i in range(3, 6):
        _put(template / "pictures", i)
    for name in ("whole", "garbage"):
        must(template, *encode, f"cache/{name}")
    damaged = shutil.copytree(template / "cache" / "whole", template / "cache" / "damaged")
    for shard in sorted(damaged.glob("*/*.parquet"))[:3]:
        flip(shard, 8 * 600)
    must(template, "k5train", "run", "cache/whole", "--model", str(model), *EMA, "-o", "runs/four")


def _put(folder: Path, number: int) -> None:
    width, height = SIZES[number % len(SIZES)]
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(100 + number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"number {number} of " + "many " * number, encoding="utf-8")
