"""The frozen transformer that one run, or every run of a sweep, trains on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.forward.load import load
from k5train.options.train import TrainConfig
from k5train.planning.plan import announce, largest_sizes, plan_training
from k5train.planning.saved_plan import SavedPlan

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5train.data.mixture import Mixture
    from k5train.planning.memory import Plan


@dataclass(frozen=True)
class Base:
    """A frozen transformer on its device, ready for one adapter after another."""

    transformer: Kandinsky5Transformer3DModel
    device: torch.device
    plan: Plan
    any_rank: bool = False
    """Its adapters are of several ranks: they are compiled for once."""


def load_base(
    data: Mixture, folder: Path, config: TrainConfig, device: torch.device, any_rank: bool = False,
    kept: SavedPlan | None = None,
) -> Base:  # fmt: skip
    """Plan, say so, and load the frozen transformer.

    Args:
        any_rank: its adapters will be of several ranks.
        kept: the plan, where a run goes on that is to end with the same bits.

    Raises:
        DoesNotFit: no plan fits, or not the kept one; found before anything is loaded.
    """
    plan = plan_training(folder, config, device, largest_sizes(*(source.cache for source in data.sources)), kept)
    console.note(f"Loading the transformer ({config.base_model_precision}) on {device}")
    announce(plan)
    return Base(load(folder, config, device, plan), device, plan, any_rank)


def follow(base: Base, kept: SavedPlan | None) -> Base:
    """A shared base for a run that goes on with a plan of its own, if it does.

    Raises:
        DoesNotFit: there is less VRAM than that takes.
        RunError: weights would have to move.
    """
    if kept is None:
        return base
    plan = kept.within(base.plan.budget)
    if plan.streaming != base.plan.streaming:
        raise RunError(
            f"{kept.run} goes on exactly only with other weights streamed than this base has",
            f"Go on with it alone: {console.command('k5train', 'resume', kept.run)}",
        )
    return replace(base, plan=plan)
