"""`k5train plan`: what would a run take on this card, or on one that is only pretended?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from k5cache.shared.checkpoint import model_folder, read_config
from k5cache.shared.console import human_bytes
from k5cache.shared.model import ModelConfig, model_of
from k5cache.shared.vram import CONTEXT_BYTES
from k5cache.store.reader import open_cache
from k5train.base.architecture import FULL_SIZE
from k5train.options.train import TrainConfig
from k5train.planning import memory, vram
from k5train.planning.plan import largest, plan_for


@dataclass(frozen=True)
class Shown:
    """A plan as it is printed."""

    title: str
    rows: list[tuple[str, str]]


def plan_without_loading(
    cache: Path | None, config: TrainConfig, model: ModelConfig | None, num_tokens: int, num_text_tokens: int
) -> Shown:
    """Plan a run from shapes alone.

    Args:
        cache: whose largest picture and caption count, instead of the two numbers.
        model: whose config.json counts; None: that of the cache's own model where it is a folder, else the published
            one's.

    Raises:
        DoesNotFit: no plan fits.
    """
    opened = open_cache(cache) if cache else None
    sizes = largest(opened) if opened else (num_tokens, num_text_tokens)
    if opened and not model:
        made_with = model_of(opened.manifest.recipe)
        model = made_with if made_with.path and Path(made_with.path).is_dir() else None
    transformer = read_config(model_folder(model, ("transformer",)), "transformer") if model else FULL_SIZE
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    # A pretended card runs as a real one would: compiled.
    device = torch.device("cuda" if on_gpu or config.memory.vram else "cpu")
    budget = vram.budget(torch.device("cuda" if on_gpu else "cpu"), config.memory.vram)
    plan = plan_for(transformer, config, device, sizes, budget)
    card = torch.cuda.get_device_name() if on_gpu else "no GPU here"
    if config.memory.vram:
        card = f"a card of {config.memory.vram}: {human_bytes(CONTEXT_BYTES)} of it for CUDA itself"
    title = (
        f"{card}; {sizes[0]} picture tokens, {sizes[1]} text tokens, batch {config.batch_size}, "
        f"{config.base_model_precision}, r{config.lora.rank} on {'+'.join(config.lora.targets)}"
    )
    return Shown(title, memory.describe(plan))
