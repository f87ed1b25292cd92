"""The frozen transformer that one run, or every run of a sweep, trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k5cache.shared import console
from k5train.forward.load import load
from k5train.options.precision import precision_of
from k5train.options.train import TrainConfig
from k5train.planning.plan import announce

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5train.planning.memory import Plan


@dataclass(frozen=True)
class Base:
    """A frozen transformer on its device, ready for one adapter after another."""

    transformer: Kandinsky5Transformer3DModel
    device: torch.device
    plan: Plan
    any_rank: bool = False
    """Its adapters have several ranks, so that compiled code must serve any rank."""


def load_base(folder: Path, config: TrainConfig, device: torch.device, plan: Plan, any_rank: bool = False) -> Base:
    """Print the plan and load the frozen transformer by it.

    Args:
        any_rank: its adapters will have several ranks.

    Raises:
        DoesNotFit: there is not enough host memory for the weights that the plan streams.
    """
    console.note(f"Loading the transformer ({precision_of(config)}) on {device}")
    announce(plan)
    with console.working("loading the transformer"):
        return Base(load(folder, config, device, plan), device, plan, any_rank)
