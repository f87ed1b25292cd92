"""Many LoRAs over one base: each run has the result it has alone, and all are compared at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.errors import DoesNotFit, RecipeError, RunError
from k5cache.shared.files import make_folder
from k5cache.shared.gpus import Slot
from k5cache.shared.lock import Locked, holder, lock_file
from k5cache.shared.model import ModelConfig
from k5cache.shared.units import count_of
from k5train.forward.precision import announce, chosen
from k5train.options.precision import can_be_dynamic, is_open, with_precision
from k5train.options.train import BaseModelPrecision
from k5train.pictures.drawings import note_sizes
from k5train.runs.compared import Comparison, compare
from k5train.runs.outcomes import Outcome
from k5train.training.cautions import cautions
from k5train.training.start import PARTS, open_data
from k5train.training.sweep_folder import Place, check_out, draw_grids, precision_in
from k5train.training.sweep_job import Job
from k5train.training.sweep_outcomes import Outcomes
from k5train.training.sweep_runs import SweepRun, warnings_of
from k5train.training.sweep_setting import is_to_be_trained, saved_plan_of, train_setting

SECONDS_TO_SAVE = 30.0


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


def sweep(
    cache: Path | None, out: Path, model: ModelConfig, sweep_runs: Sequence[SweepRun], gpus: Sequence[Slot] = ()
) -> Swept:
    """Train every run in ``out/<label>``. Finished runs there are skipped, and one that was stopped goes on.

    Runs of an earlier sweep in ``out`` stay, and are compared with these.

    Args:
        gpus: where as many runs are trained at a time, in a process each. One or none: in this process.

    Raises:
        RunError: ``out`` has runs of these names that were started with other options, or runs over another base or
            cache; or another process is writing it.
        OutputError: ``out`` holds something else, or cannot be written. This is found before anything is loaded.
    """
    first = cache or Path(sweep_runs[0].config.data[0].cache)
    sweep_runs = with_known_precision(out, sweep_runs)
    check_out(out, first, model, sweep_runs)
    place = Place(cache, out, model, model_folder(model, PARTS))  # refused before a folder is made for the sweep
    if len(gpus) > 1:
        check_devices(sweep_runs)
        gpus = used_gpus(gpus, sum(is_to_be_trained(out / sweep_run.label) for sweep_run in sweep_runs))
    if len(gpus) < 2:
        sweep_runs = decide_together(sweep_runs)
    with _locked(out):
        wait_for_what_is_saved(out, sweep_runs)
        outcomes = Outcomes(out, [sweep_run.label for sweep_run in sweep_runs])
        if len(gpus) < 2:
            _say_before(place, sweep_runs)
            _train_all(place, sweep_runs, outcomes)
        else:
            _train_on(gpus, place, sweep_runs, outcomes)
        finished = [out / outcome.label for outcome in outcomes.all() if not outcome.problem]
        grids = tuple(draw_grids(out, outcomes.all()))
        return Swept(tuple(outcomes.all()), compare(finished) if finished else None, grids, outcomes.advice)


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


def check_devices(sweep_runs: Sequence[SweepRun]) -> None:
    """Refuse a recipe that names its device, where a process is given each GPU.

    Raises:
        RecipeError: it does.
    """
    device = sweep_runs[0].config.device  # the same for all of them
    if device not in ("auto", "cuda"):
        raise RecipeError(
            f"train.device={device} and several GPUs contradict each other",
            "Leave one of train.device and --gpus out; CUDA_VISIBLE_DEVICES says which GPUs --gpus counts",
        )


def used_gpus(gpus: Sequence[Slot], num_waiting: int) -> Sequence[Slot]:
    """As many of the GPUs as there are runs to train. Says so if that is not all of them."""
    if num_waiting < len(gpus):
        runs = f"{count_of(num_waiting, 'run')} {'is' if num_waiting == 1 else 'are'} left to train"
        console.note(f"{runs}, so {count_of(num_waiting, 'GPU')} of {len(gpus)} will be used")
    return gpus[:num_waiting]


def wait_for_what_is_saved(out: Path, sweep_runs: Sequence[SweepRun], seconds: float = SECONDS_TO_SAVE) -> None:
    """Wait for the processes of a sweep in this folder that was killed: they stop by themselves, and save first.

    Whoever has a run after so long has it for another reason, which the run itself reports.
    """
    deadline = time.monotonic() + seconds
    for root in (out / sweep_run.label for sweep_run in sweep_runs):
        is_said = False
        while time.monotonic() < deadline and (owner := holder(root / ".lock")) and owner.is_here:
            if not is_said:
                console.note(f"Waiting for process {owner.pid}, which has {root}, to save and end")
                is_said = True
            time.sleep(0.1)


def _say_before(place: Place, sweep_runs: Sequence[SweepRun]) -> None:
    for line in warnings_of(sweep_runs, partial(_cautions, place)):
        console.warn(line)
    note_sizes(open_data(place.cache, sweep_runs[0].config).first, sweep_runs[0].config.validation)


def _cautions(place: Place, sweep_run: SweepRun) -> list[str]:
    try:
        return cautions(sweep_run.config, open_data(place.cache, sweep_run.config), place.model)
    except RecipeError:  # that run reports it when its turn comes
        return []


def _train_all(place: Place, sweep_runs: Sequence[SweepRun], outcomes: Outcomes) -> None:
    """Train one run after another in this process."""
    from k5train.training.shared_base import share_base  # torch is imported here

    base = share_base(place, sweep_runs, saved_plan_of(place.out, sweep_runs))
    for number, sweep_run in enumerate(sweep_runs, 1):
        console.note(f"Run {number} of {len(sweep_runs)}: {sweep_run.label}", "bold")
        problem = None
        try:
            train_setting(place, sweep_run, base)
        except (RunError, RecipeError, DoesNotFit) as error:
            problem = error
            console.warn(f"{sweep_run.label}: {error.problem}. {error.fix}")
        outcomes.note(sweep_run.label, problem)


def _train_on(gpus: Sequence[Slot], place: Place, sweep_runs: Sequence[SweepRun], outcomes: Outcomes) -> None:
    """Train as many runs at a time as there are GPUs, in a process each."""
    from k5train.training.sweep_on_gpus import Crew

    job = Job(place, tuple(sweep_runs), saved_plan_of(place.out, sweep_runs))
    waiting = [run.label for run in sweep_runs if is_to_be_trained(place.out / run.label)]
    for run in sweep_runs:
        if run.label not in waiting:
            outcomes.note(run.label, None)

    def decided(precision: BaseModelPrecision | None) -> None:
        if precision:
            announce(precision)
        _say_before(place, sweep_runs if precision is None else _all_with(sweep_runs, precision))

    Crew(job, waiting, decided, outcomes.note).run(gpus)


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
