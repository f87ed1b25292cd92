"""The transformer that all runs of a sweep are trained on: loaded once, with a plan for the most demanding of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import RecipeError
from k5train.adapter.targets import RankTooHigh
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.planning.plan import largest_sizes, plan_for, plan_training
from k5train.planning.saved_plan import SavedPlan, read_saved_plan
from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state
from k5train.training.base import Base, load_base
from k5train.training.device import pick_device
from k5train.training.sweep_runs import SweepRun


class SharedBase:
    """The transformer that all runs are trained on, loaded for the first one that is trained."""

    def __init__(self, out: Path, folder: Path, config: TrainConfig, sweep_runs: Sequence[SweepRun]) -> None:
        self.out, self.folder, self.config, self.sweep_runs = out, folder, config, sweep_runs
        self._base: Base | None = None

    def load(self, data: Mixture) -> Base:
        """Load it unless it is loaded."""
        if self._base is None:
            configs = [sweep_run.config for sweep_run in self.sweep_runs]
            any_rank = len({(config.lora.rank, config.lora.ranks) for config in configs}) > 1
            device = pick_device(self.config.device, self.folder)
            sizes = largest_sizes(*(source.cache for source in data.sources))
            saved = _saved_plan(self.out, self.sweep_runs)
            plan = plan_training(self.folder, self.config, device, sizes, saved)
            self._base = load_base(self.folder, self.config, device, plan, any_rank)
        return self._base


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


def _saved_plan(out: Path, sweep_runs: Sequence[SweepRun]) -> SavedPlan | None:
    """The plan of an unfinished run that must go on with it. The other runs then use it too, on the same base."""
    unfinished = [(run, s.config) for s in sweep_runs if not (run := Run(out / s.label)).is_finished]
    saved_plans = (read_saved_plan(latest_state(run.state), config.deterministic) for run, config in unfinished)
    return next((saved_plan for saved_plan in saved_plans if saved_plan), None)
