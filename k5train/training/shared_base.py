"""The transformer that all runs of a sweep are trained on: loaded once, with a plan for the most demanding of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import RecipeError
from k5train.adapter.targets import RankTooHigh
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.planning.plan import largest_sizes, plan_for, plan_training
from k5train.planning.saved_plan import SavedPlan
from k5train.training.base import Base, load_base
from k5train.training.device import pick_device
from k5train.training.start import open_data
from k5train.training.sweep_folder import Place
from k5train.training.sweep_runs import SweepRun

if TYPE_CHECKING:
    from k5train.planning.memory import Plan


class SharedBase:
    """The transformer that all runs are trained on, planned and loaded for the first one that is trained.

    Args:
        config: of the run that needs most.
        any_rank: the runs have several ranks.
        saved_plan: the plan that an unfinished run must go on with.
    """

    def __init__(self, folder: Path, config: TrainConfig, any_rank: bool, saved_plan: SavedPlan | None) -> None:
        self.folder, self.config, self.any_rank, self.saved_plan = folder, config, any_rank, saved_plan
        self._base: Base | None = None
        self._plan: Plan | None = None

    def plan(self, data: Mixture) -> Plan:
        """Plan it for this machine unless it is planned. Nothing is loaded."""
        if self._plan is None:
            sizes = largest_sizes(*(source.cache for source in data.sources))
            self._plan = plan_training(self.folder, self.config, self._device(), sizes, self.saved_plan)
        return self._plan

    def load(self, data: Mixture) -> Base:
        """Load it unless it is loaded."""
        if self._base is None:
            self._base = load_base(self.folder, self.config, self._device(), self.plan(data), self.any_rank)
        return self._base

    def _device(self) -> torch.device:
        return pick_device(self.config.device, self.folder)


def share_base(place: Place, sweep_runs: Sequence[SweepRun], saved_plan: SavedPlan | None) -> SharedBase:
    """The base for runs that share one, not loaded yet.

    Raises:
        RankTooHigh: as ``most_demanding``.
    """
    configs = [sweep_run.config for sweep_run in sweep_runs]
    config = most_demanding(open_data(place.cache, configs[0]), place.folder, configs)
    any_rank = len({(config.lora.rank, config.lora.ranks) for config in configs}) > 1
    return SharedBase(place.folder, config, any_rank, saved_plan)


def most_demanding(data: Mixture, folder: Path, configs: Sequence[TrainConfig]) -> TrainConfig:
    """The run that needs most memory. The shared base is planned for it.

    Raises:
        RankTooHigh: a run's rank is above a side of a matrix.
    """
    sizes = largest_sizes(*(source.cache for source in data.sources))
    device, transformer = pick_device(configs[0].device, folder), read_config(folder, "transformer")

    def demand(config: TrainConfig) -> tuple[bool, int]:
        try:
            peak = plan_for(transformer, config, device, sizes, None).peak
        except RankTooHigh:  # a slip in the grid: refused before hours are spent on the other runs
            raise
        except RecipeError:  # a target that matches nothing: that run reports it when its turn comes
            return False, 0
        return config.lora.algo in ("dora", "lokr"), peak  # their blocks are not compiled, and keep more

    return max(configs, key=demand)
