"""``k5train plan``: what would a run need on this card, or on an imagined one?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k5cache.shared.checkpoint import folder_without_weights, read_config
from k5cache.shared.console import human_bytes
from k5cache.shared.host_memory import free_ram
from k5cache.shared.kind import LONG_NAMES, Kind
from k5cache.shared.model import ModelConfig, model_of
from k5cache.shared.places import model_near
from k5cache.shared.vram import CONTEXT_BYTES
from k5cache.store.reader import Cache, open_cache
from k5train.options.precision import precision_of
from k5train.options.rate import with_usual_rate
from k5train.options.train import TrainConfig
from k5train.planning.described import describe
from k5train.planning.memory import Plan
from k5train.planning.time import Size


class Timed(NamedTuple):
    """A plan on the GPU that is here, which ``k5train/bench/probe.py``: ``estimate`` can time."""

    transformer: Mapping[str, Any]
    config: TrainConfig
    plan: Plan
    sizes: list[Size]


@dataclass(frozen=True)
class PlanText:
    """A plan as it is printed."""

    title: str
    rows: list[tuple[str, str]]
    timed: Timed | None = None
    """What a probe of its time needs. None: there is no GPU."""


def plan_without_loading(
    cache: Path | None,
    config: TrainConfig,
    model: ModelConfig | None,
    num_tokens: int,
    num_text_tokens: int,
    kind: Kind = "t2i",
    others: Sequence[Path] = (),
    decide: Callable[[TrainConfig], TrainConfig] = lambda config: config,
) -> PlanText:
    """Plan a run from shapes alone.

    Args:
        cache: plan for its largest picture and caption. None: for ``num_tokens`` and ``num_text_tokens``.
        model: plan for its config.json. None: for the model that the cache was encoded for if that is a folder, else
            for the published one.
        kind: of the published model, if there is no cache.
        others: further caches of the run.
        decide: gives a recipe the precision that ``auto`` means. Called after what needs no torch.

    Raises:
        DoesNotFit: no plan fits.
    """
    opened = open_cache(cache) if cache else None
    caches = [opened, *map(open_cache, others)] if opened else []
    kind = opened.kind if opened else kind
    if opened and not model:
        encoded_for = model_near(model_of(opened.manifest.recipe), opened.root)
        model = encoded_for if encoded_for.path and Path(encoded_for.path).is_dir() else None
    named = read_config(folder_without_weights(model, ("transformer",)), "transformer") if model else None

    import torch  # only now: what is missing is said at once

    from k5train.base.architecture import full_size
    from k5train.planning import vram
    from k5train.planning.plan import check_ram, largest_sizes, plan_for

    transformer = named or full_size(kind)
    config = decide(config)
    sizes = largest_sizes(*caches) if caches else (num_tokens, num_text_tokens)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    # An imagined card runs compiled, as a real one would.
    device = torch.device("cuda" if on_gpu or config.memory.vram else "cpu")
    budget = vram.budget(torch.device("cuda" if on_gpu else "cpu"), config.memory.vram)
    plan = plan_for(transformer, config, device, sizes, budget)
    rows = describe(plan)
    optim = with_usual_rate(config).optim
    rows.append(("learning rate", f"{optim.lr:g} with {optim.optimizer}"))
    if device.type == "cpu":
        check_ram(plan, transformer, config, free := free_ram())
        rows.append(("free RAM", human_bytes(free)))
    card = torch.cuda.get_device_name() if on_gpu else "no GPU here"
    if config.memory.vram:
        card = f"a card of {config.memory.vram}: {human_bytes(CONTEXT_BYTES)} of it for CUDA itself"
    edits = f"{LONG_NAMES['i2i']}, " if transformer.get("visual_cond") else ""
    title = (
        f"{card}; {edits}{sizes[0]} picture tokens, {sizes[1]} text tokens, batch {config.batch_size}, "
        f"{precision_of(config)}, r{config.lora.rank} on {'+'.join(config.lora.targets)}"
    )
    usual = sizes_of(*caches) if caches else [Size(*sizes, 1.0)]
    return PlanText(title, rows, Timed(transformer, config, plan, usual) if on_gpu else None)


def sizes_of(*caches: Cache) -> list[Size]:
    """The sizes of the pictures of some caches, each with its share, and the middle one of their captions' lengths."""
    rows: Counter[int] = Counter()
    for shard in (shard for cache in caches for shard in cache.manifest.shards):
        if shard.kind == "latents" and shard.bucket:
            rows[(shard.bucket[0] // 16) * (shard.bucket[1] // 16)] += shard.num_rows
    lengths = np.sort(np.concatenate([cache.texts().n_tokens for cache in caches]))
    middle = int(lengths[len(lengths) // 2]) if len(lengths) else 1
    return [Size(tokens, middle, n / rows.total()) for tokens, n in sorted(rows.items())]
