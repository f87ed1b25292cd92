"""What fits which card? The tables of docs/memory_and_cards.md, by the planners of both stages, from shapes alone.

    python -m pipelines.measure.cards

No GPU and no download is needed. A test compares the page with these rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from k5cache.encoders.memory_plan import TextArchitecture, plan_text, plan_vae
from k5cache.encoders.random_model import FULL_TEXT, FULL_VAE
from k5cache.shared.console import parse_bytes
from k5cache.shared.errors import DoesNotFit
from k5train.base.architecture import FULL_SIZE
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.precision import with_precision
from k5train.options.train import TrainConfig
from k5train.planning import vram
from k5train.planning.memory import Plan
from k5train.planning.plan import plan_for

GIB = 2**30
CARDS = ("8 GB", "10 GB", "12 GB", "16 GB", "24 GB")
SIZES = (512, 768, 1024, 1280)
TEXT_TOKENS = 512
WORDS = {"all": "keep everything", "matmuls": "keep all matmuls", "selective": "selective",
         "attention": "keep attention only", "nothing": "recompute all"}  # fmt: skip

_SMALL = LoraConfig(rank=16, targets=("qkv",))
LEVERS: Mapping[str, tuple[int, TrainConfig]] = {
    "no change": (1024, TrainConfig()),
    "`train.lora.rank=16`": (1024, TrainConfig(lora=LoraConfig(rank=16))),
    "`train.lora.rank=8`": (1024, TrainConfig(lora=LoraConfig(rank=8))),
    '`train.lora.targets=["qkv"]`': (1024, TrainConfig(lora=LoraConfig(targets=("qkv",)))),
    'both: `rank=16`, `targets=["qkv"]`': (1024, TrainConfig(lora=_SMALL)),
    "`train.optim.optimizer=adamw8bit`": (1024, TrainConfig(optim=OptimConfig(optimizer="adamw8bit"))),
    "`train.optim.optimizer=adafactor`": (1024, TrainConfig(optim=OptimConfig(optimizer="adafactor"))),
    "`cache.resolution=768`": (768, TrainConfig()),
    "`cache.resolution=512`": (512, TrainConfig()),
    'all three: `resolution=512`, `rank=16`, `targets=["qkv"]`': (512, TrainConfig(lora=_SMALL)),
    "`train.memory.enable_group_offload=true`": (1024, TrainConfig(memory=MemoryConfig(enable_group_offload=True))),
    "`train.batch_size=2`": (1024, TrainConfig(batch_size=2)),
    "`train.lora.rank=64`": (1024, TrainConfig(lora=LoraConfig(rank=64))),
}
"""What can be changed on a small card, with the size of the images that it is about."""


def plan_on(card: str, size: int, config: TrainConfig) -> Plan | None:
    """The plan for square images of ``size`` with a caption of ``TEXT_TOKENS``; None if nothing fits."""
    config = with_precision(config, "int8-dynamic")  # what auto is on such cards
    budget = vram.budget(torch.device("cpu"), card)
    try:
        return plan_for(FULL_SIZE, config, torch.device("cuda"), ((size // 16) ** 2, TEXT_TOKENS), budget)
    except DoesNotFit:
        return None


def train_cell(card: str, size: int) -> str:
    """What a recipe without changes does on a card, such as ``7.0: recompute all, 29 streamed``."""
    plan = plan_on(card, size, TrainConfig())
    if plan is None:
        return "does not fit"
    counts = {name: plan.levels.count(name) for name in WORDS if name in plan.levels}
    parts = [WORDS[name] if len(counts) == 1 else f"{count} {WORDS[name]}" for name, count in counts.items()]
    if plan.streaming:
        parts.append(f"{plan.streaming.num_blocks} streamed")
    return f"{plan.peak / GIB:.1f}: {', '.join(parts)}"


def lever_row(lever: str) -> tuple[str, str, str]:
    """Blocks that are streamed on a card of 8 GB, what they wait in, and what blocks keep."""
    plan = plan_on("8 GB", *LEVERS[lever])
    if plan is None:
        return "does not fit", "", ""
    streamed = plan.streaming.num_blocks if plan.streaming else 0
    kept = ", ".join(WORDS[name] for name in WORDS if name in plan.levels)
    return f"{streamed} of {len(plan.levels)}", f"{plan.host_bytes / GIB:.1f} GiB", kept


def encode_row(card: str) -> tuple[str, str, str]:
    """How the text encoder passes over a card in bf16 and in int8, and the VAE at 1024x1024; in GiB."""
    num_bytes = parse_bytes(card)
    texts: list[str] = []
    for precision in ("bf16", "int8"):
        text = plan_text(
            TextArchitecture.of(FULL_TEXT), precision, "exact", TEXT_TOKENS, vram=num_bytes, ram=16 * GIB,
            num_tokens=60_000,
        )  # fmt: skip
        texts.append(f"{text.mode}, {text.vram / GIB:.1f}")
    vae = plan_vae(FULL_VAE, "fp32", 1024**2, vram=num_bytes, ram=16 * GIB)
    return texts[0], texts[1], f"{vae.mode}, {vae.vram / GIB:.1f}"


def tables() -> Iterator[str]:
    """The rows, as the page has them."""
    for card in CARDS:
        yield line(card, *(train_cell(card, size) for size in SIZES))
    for lever in LEVERS:
        yield line(lever, *lever_row(lever))
    for card in ("4 GB", "6 GB", *CARDS):
        yield line(card, *encode_row(card))


def line(*cells: Any) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(tables()))
