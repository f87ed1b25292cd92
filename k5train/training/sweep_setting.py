"""One run of a sweep: is there anything to train, and train it on the base that all runs share. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from k5cache.shared.errors import RunError
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.model import ModelConfig
from k5cache.shared.outputs import kind_of
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.pictures.saved import FILE as DRAWN
from k5train.planning.saved_plan import SavedPlan, read_saved_plan
from k5train.runs.folder import Run, create_run
from k5train.runs.resume_state import latest_state
from k5train.training.overwriting import check_beginning
from k5train.training.start import open_data
from k5train.training.sweep_folder import Place, open_same, runs_in
from k5train.training.sweep_runs import SweepRun
from k5train.training.train import train

if TYPE_CHECKING:
    from k5train.training.shared_base import SharedBase


def is_to_be_trained(root: Path) -> bool:
    """Also a run whose LoRA was deleted and can be written again from its state."""
    run = Run(root)
    return not run.is_finished or (not run.lora.is_file() and latest_state(run.state) is not None)


def train_setting(place: Place, sweep_run: SweepRun, base: SharedBase) -> None:
    """Train a run of a sweep in its folder, unless it is finished. One that was stopped goes on.

    Raises:
        K5Error, KeyboardInterrupt: as ``train``.
    """
    data = open_data(place.cache, sweep_run.config)
    run = _open(place.out / sweep_run.label, data, place.model, sweep_run.config)
    if not is_to_be_trained(run.root):
        return
    if latest_state(run.state) is None:
        check_beginning(run, data, sweep_run.config)  # as train does, but before the base is loaded
    if not run.samples(0).exists():
        _copy_base_pictures(run)
    train(data, place.folder, replace(sweep_run.config, name=run.name), run, base.load(data), always_probe=True)


def saved_plan_of(out: Path, sweep_runs: Sequence[SweepRun]) -> SavedPlan | None:
    """The plan of an unfinished run that must go on with it. The other runs then use it too, on the same base."""
    for sweep_run in sweep_runs:
        run = Run(out / sweep_run.label)
        with suppress(RunError):  # its state is damaged, which it says when its turn comes
            saved = None if run.is_finished else latest_state(run.state)
            if saved_plan := read_saved_plan(saved, sweep_run.config.deterministic):
                return saved_plan
    return None


def _open(root: Path, data: Mixture, model: ModelConfig, config: TrainConfig) -> Run:
    if kind_of(root) != "run":
        return create_run(root, data.first.root, model, replace(config, name=root.name))
    return open_same(root, data.first.root, model, config)


def _copy_base_pictures(target: Run) -> None:
    """The base model's pictures are the same for every run. A run with other drawing options draws its own.

    ``drawn.json`` is written last, here as where they are drawn: without it another process is not done with them.
    """
    for root in runs_in(target.root.parent):
        source = Run(root).samples(0)
        if not (source / DRAWN).is_file():
            continue
        make_folder(target.samples(0))
        for picture in sorted(source.iterdir()):
            if picture.is_file() and picture.name != DRAWN:
                shutil.copy2(picture, target.samples(0))
        write_whole(target.samples(0) / DRAWN, partial(shutil.copyfile, source / DRAWN))
        return
