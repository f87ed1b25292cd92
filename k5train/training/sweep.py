"""Many LoRAs over one base: each run has the result it has alone, and all are compared at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.errors import DoesNotFit, RecipeError, RunError
from k5cache.shared.files import make_folder
from k5cache.shared.lock import Locked, lock_file
from k5cache.shared.model import ModelConfig
from k5cache.shared.outputs import kind_of
from k5train.data.mixture import Mixture
from k5train.forward.precision import announce, chosen
from k5train.options.precision import can_be_dynamic, is_open, with_precision
from k5train.options.train import BaseModelPrecision, TrainConfig
from k5train.pictures.drawings import note_sizes
from k5train.runs.compared import Comparison, compare
from k5train.runs.folder import Run, create_run
from k5train.runs.outcomes import FILE, Outcome, write_outcomes
from k5train.runs.resume_state import latest_state, remove_states
from k5train.training.cautions import cautions
from k5train.training.overwriting import check_beginning
from k5train.training.start import PARTS, open_data
from k5train.training.sweep_folder import (
    check_out,
    draw_grids,
    open_same,
    outcome_of,
    outcomes_before,
    precision_in,
    runs_in,
)
from k5train.training.sweep_runs import SweepRun, warnings_of
from k5train.training.train import train

if TYPE_CHECKING:
    from k5train.training.shared_base import SharedBase


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves behind."""

    outcomes: tuple[Outcome, ...]
    """Of every run in the folder, also of earlier sweeps there."""
    comparison: Comparison | None
    """Of those that are finished. None if there are none."""
    grids: tuple[Path, ...]
    """Pictures of the base model and of the end of each finished run. Usually one; one more for each way of drawing."""
    advice: Mapping[str, str] = field(default_factory=dict)
    """What would help each run that failed now, by its label."""


def sweep(cache: Path | None, out: Path, model: ModelConfig, sweep_runs: Sequence[SweepRun]) -> Swept:
    """Train every run in ``out/<label>``. Finished runs there are skipped, and one that was stopped goes on.

    Runs of an earlier sweep in ``out`` stay, and are compared with these.

    Raises:
        RunError: ``out`` has runs of these names that were started with other options, or runs over another base or
            cache; or another process is writing it.
        OutputError: ``out`` holds something else, or cannot be written. This is found before anything is loaded.
    """
    first = cache or Path(sweep_runs[0].config.data[0].cache)
    sweep_runs = with_known_precision(out, sweep_runs)
    check_out(out, first, model, sweep_runs)
    folder = model_folder(model, PARTS)  # refused before a folder is made for the sweep
    sweep_runs = decide_together(sweep_runs)
    with _locked(out):
        for line in warnings_of(sweep_runs, partial(_cautions, cache, model)):
            console.warn(line)
        by_label, advice = _train_all(cache, out, model, folder, sweep_runs)
        outcomes = tuple(by_label.values())
        finished = [out / outcome.label for outcome in outcomes if not outcome.problem]
        return Swept(outcomes, compare(finished) if finished else None, tuple(draw_grids(out, outcomes)), advice)


def with_known_precision(out: Path, sweep_runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs with the one precision that ``auto`` means for all of them, if no GPU need be asked: the runs that are
    in ``out`` have it, or one of these cannot be trained on int8 tensor cores."""
    if not any(is_open(sweep_run.config) for sweep_run in sweep_runs):
        return list(sweep_runs)
    known = precision_in(out)
    if not all(can_be_dynamic(sweep_run.config) for sweep_run in sweep_runs) and known in (None, "int8-dynamic"):
        known = "int8-quanto"
    return _all_with(sweep_runs, known or "auto")


def decide_together(sweep_runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs with the precision that ``auto`` means on this machine."""
    if not any(is_open(sweep_run.config) for sweep_run in sweep_runs):
        return list(sweep_runs)
    precision = chosen([sweep_run.config for sweep_run in sweep_runs])
    announce(precision)
    return _all_with(sweep_runs, precision)


def _all_with(sweep_runs: Sequence[SweepRun], precision: BaseModelPrecision) -> list[SweepRun]:
    return [replace(run, config=with_precision(run.config, precision)) for run in sweep_runs]


def _cautions(cache: Path | None, model: ModelConfig, sweep_run: SweepRun) -> list[str]:
    try:
        return cautions(sweep_run.config, open_data(cache, sweep_run.config), model)
    except RecipeError:  # that run reports it when its turn comes
        return []


def _train_all(
    cache: Path | None, out: Path, model: ModelConfig, folder: Path, sweep_runs: Sequence[SweepRun]
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """How every run in the folder ended, and what would help those that failed now, by their labels.

    ``sweep.json`` is written after each run.
    """
    advice: dict[str, str] = {}
    configs = [sweep_run.config for sweep_run in sweep_runs]
    outcomes = outcomes_before(out, [sweep_run.label for sweep_run in sweep_runs])
    if not (out / FILE).exists():  # from now on the folder is a sweep's
        write_outcomes(out, list(outcomes.values()))
    data = open_data(cache, configs[0])
    note_sizes(data.first, configs[0].validation)
    from k5train.training.shared_base import SharedBase, most_demanding  # torch is imported here

    base = SharedBase(out, folder, most_demanding(data, folder, configs), sweep_runs)
    for number, sweep_run in enumerate(sweep_runs, 1):
        console.note(f"Run {number} of {len(sweep_runs)}: {sweep_run.label}", "bold")
        data = open_data(cache, sweep_run.config)
        run = _open(out / sweep_run.label, data, model, sweep_run.config)
        problem = None
        if _is_to_be_trained(run):
            try:
                _train(data, folder, sweep_run.config, run, base)
            except (RunError, RecipeError, DoesNotFit) as error:
                problem, advice[sweep_run.label] = error.problem, error.fix
                console.warn(f"{sweep_run.label}: {problem}. {error.fix}")
        outcome = outcomes[sweep_run.label] = outcome_of(run.root, problem)
        if not outcome.problem:
            remove_states(run.state)  # three times the size of the LoRA. Also what a kill kept of a finished run
        write_outcomes(out, list(outcomes.values()))
    return outcomes, advice


def _is_to_be_trained(run: Run) -> bool:
    """Also a run whose LoRA was deleted and can be written again from its state."""
    return not run.is_finished or (not run.lora.is_file() and latest_state(run.state) is not None)


def _train(data: Mixture, folder: Path, config: TrainConfig, run: Run, base: SharedBase) -> None:
    if latest_state(run.state) is None:
        check_beginning(run, data, config)  # as train does, but before the base is loaded
    if not run.samples(0).exists():
        _copy_base_pictures(run)
    train(data, folder, replace(config, name=run.name), run, base.load(data), always_probe=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    make_folder(out)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(out / ".lock"))
        except Locked as error:
            raise RunError(
                f"{out} is being written by {error.owner}", "Wait for it, or give another folder with -o"
            ) from None
        yield


def _open(root: Path, data: Mixture, model: ModelConfig, config: TrainConfig) -> Run:
    if kind_of(root) != "run":
        return create_run(root, data.first.root, model, replace(config, name=root.name))
    return open_same(root, data.first.root, model, config)


def _copy_base_pictures(target: Run) -> None:
    """The base model's pictures are the same for every run. A run with other drawing options draws its own."""
    for root in runs_in(target.root.parent):
        if Run(root).samples(0).is_dir():
            shutil.copytree(Run(root).samples(0), target.samples(0))
            return
