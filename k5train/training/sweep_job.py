"""What is a worker of a sweep told? The whole sweep as JSON, so that it plans as one process for all runs would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, to_dict
from k5train.options.precision import with_precision
from k5train.options.train import BaseModelPrecision, TrainConfig
from k5train.planning.saved_plan import SavedPlan, plan_of
from k5train.training.sweep_folder import Place
from k5train.training.sweep_runs import SweepRun


@dataclass(frozen=True)
class Job:
    """A sweep, of which a worker is told one run after another."""

    place: Place
    sweep_runs: tuple[SweepRun, ...]
    """All of them, also those that are finished: the base is planned for the most demanding one."""
    saved_plan: SavedPlan | None = None
    """The plan that an unfinished run must go on with, as it was when the sweep began."""

    def with_precision(self, precision: BaseModelPrecision) -> Job:
        """The same with one precision for all runs, where it is still open."""
        runs = tuple(replace(run, config=with_precision(run.config, precision)) for run in self.sweep_runs)
        return replace(self, sweep_runs=runs)

    def to_json(self) -> dict[str, Any]:
        """Plain values, of which ``read_job`` makes the same job."""
        saved = self.saved_plan
        return {
            "cache": str(self.place.cache) if self.place.cache else None,
            "out": str(self.place.out),
            "model": to_dict(self.place.model),
            "folder": str(self.place.folder),
            "runs": [{"label": run.label, "train": to_dict(run.config)} for run in self.sweep_runs],
            "saved_plan": {"run": str(saved.run), "plan": asdict(saved.plan)} if saved else None,
        }


def read_job(document: Mapping[str, Any]) -> Job:
    """The job that ``to_json`` gave."""
    (model,) = parse({"model": document["model"]}, {"model": ModelConfig})
    cache, saved = document["cache"], document["saved_plan"]
    runs = []
    for run in document["runs"]:
        (config,) = parse({"train": run["train"]}, {"train": TrainConfig})
        runs.append(SweepRun(run["label"], config))
    place = Place(Path(cache) if cache else None, Path(document["out"]), model, Path(document["folder"]))
    return Job(place, tuple(runs), SavedPlan(Path(saved["run"]), plan_of(saved["plan"])) if saved else None)
