"""Many LoRAs over one base: each run has the result it has alone, and all are compared at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from PIL import Image

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder, read_config
from k5cache.shared.errors import DoesNotFit, RecipeError, RunError
from k5cache.shared.files import make_folder, write_json, write_whole
from k5cache.shared.inside import check_inside, name_problem
from k5cache.shared.lock import Locked, lock_file
from k5cache.shared.model import ModelConfig
from k5cache.shared.outputs import HARMLESS, check_folder, check_writable, kind_of
from k5cache.shared.plain import read_plain
from k5cache.shared.recipe import to_dict
from k5cache.shared.sealed import unseal_if_sealed
from k5train.adapter.targets import RankTooHigh
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.pictures import sheet
from k5train.pictures.drawings import note_sizes
from k5train.pictures.references import References, read_references
from k5train.pictures.saved import read_labels, read_pictures
from k5train.planning.plan import largest_sizes, plan_for, plan_training
from k5train.planning.saved_plan import SavedPlan, read_saved_plan
from k5train.runs.differences import differences
from k5train.runs.folder import Run, check_new, create_run, open_run
from k5train.runs.metrics import read_metrics
from k5train.runs.resume_state import latest_state, remove_states
from k5train.runs.written import check_recorded
from k5train.training.base import Base, load_base
from k5train.training.device import pick_device
from k5train.training.start import PARTS, UNIMPORTANT, open_data
from k5train.training.sweep_runs import SweepRun
from k5train.training.train import Result, train

SWEEP_FILE = "sweep.json"  # how each run ended; its folder is a sweep's
GRID_FILE = "samples.png"


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended."""

    label: str
    lora: str
    steps: int = 0
    last_loss: float | None = None
    best_loss: float | None = None
    seconds: float | None = None
    seconds_to_start: float | None = None
    problem: str | None = None
    """The error that ended it before its last step, such as a loss that is not finite."""


def sweep(
    cache: Path | None, out: Path, model: ModelConfig, sweep_runs: Sequence[SweepRun]
) -> tuple[list[Outcome], Path | None]:
    """Train every run in ``out/<label>``. Finished runs there are skipped, and one that was stopped goes on.

    Returns:
        the outcome of each run; and the picture grid with a row for the base model and one for each run, all drawn on
        the same noise.

    Raises:
        RunError: ``out`` has runs that were started with other options, or another process is writing it.
        OutputError: ``out`` holds something else, or cannot be written. This is found before anything is loaded.
    """
    _check_out(out, model, sweep_runs)
    folder = model_folder(model, PARTS)  # refused before a folder is made for the sweep
    with _locked(out):
        return _sweep(cache, out, model, folder, sweep_runs)


def _sweep(
    cache: Path | None, out: Path, model: ModelConfig, folder: Path, sweep_runs: Sequence[SweepRun]
) -> tuple[list[Outcome], Path | None]:
    configs = [sweep_run.config for sweep_run in sweep_runs]
    first_data = open_data(cache, configs[0])
    note_sizes(first_data.first, configs[0].validation)
    base_config = most_demanding(first_data, folder, configs)
    any_rank = len({(config.lora.rank, config.lora.ranks) for config in configs}) > 1
    base: Base | None = None
    first_run: Run | None = None
    outcomes = []
    if not (out / SWEEP_FILE).exists():  # from now on the folder is a sweep's
        write_json(out / SWEEP_FILE, [])
    for number, sweep_run in enumerate(sweep_runs, 1):
        console.note(f"Run {number} of {len(sweep_runs)}: {sweep_run.label}", "bold")
        data = open_data(cache, sweep_run.config)
        run = _open(out / sweep_run.label, data, model, sweep_run.config)
        if not run.is_finished:
            if base is None:
                device = pick_device(base_config.device, folder)
                sizes = largest_sizes(*(source.cache for source in data.sources))
                plan = plan_training(folder, base_config, device, sizes, _saved_plan(out, sweep_runs))
                base = load_base(folder, base_config, device, plan, any_rank)
            if first_run is not None and not run.samples(0).exists():
                _copy_base_pictures(first_run, run)
            try:
                train(data, folder, replace(sweep_run.config, name=run.name), run, base)
            except (RunError, RecipeError, DoesNotFit) as error:
                console.warn(f"{sweep_run.label}: {error.problem}")
                outcomes.append(Outcome(sweep_run.label, str(run.lora), _steps_done(run), problem=error.problem))
                continue
        remove_states(run.state)  # three times the size of the LoRA. Also what a kill kept of a run that is finished
        outcomes.append(_outcome(sweep_run.label, run))
        first_run = first_run or run
    write_json(out / SWEEP_FILE, [asdict(outcome) for outcome in outcomes])
    finished = {outcome.label for outcome in outcomes if not outcome.problem}
    return outcomes, _draw_grid(out, [sweep_run for sweep_run in sweep_runs if sweep_run.label in finished])


def _check_out(out: Path, model: ModelConfig, sweep_runs: Sequence[SweepRun]) -> None:
    """Refuse a folder that is not this sweep's, and all of its runs' folders, before the first run begins."""
    labels = {sweep_run.label for sweep_run in sweep_runs}

    def is_unfinished(folder: Path) -> bool:
        """Whether it holds only runs of this sweep: until its end, an earlier version wrote nothing else."""
        entries = [entry for entry in folder.iterdir() if not HARMLESS.fullmatch(entry.name) and entry.name != ".lock"]
        return all(entry.name in labels and kind_of(entry) == "run" for entry in entries)

    check_folder(out, "sweep", is_unfinished)
    check_inside(out, (".lock", SWEEP_FILE, GRID_FILE, *labels))
    check_writable(out)
    for sweep_run in sweep_runs:
        problem = name_problem(sweep_run.label)
        if problem:
            raise RecipeError(f"The name of a run of a sweep {problem}", "Give it another name in a --list")
        if sweep_run.label in (SWEEP_FILE, GRID_FILE):
            raise RecipeError(f"A run of a sweep cannot be called {sweep_run.label}", "Give it another name")
        root = out / sweep_run.label
        if kind_of(root) == "run":
            _check_same(root, model, sweep_run.config)
        else:
            check_new(root)


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


def _open(root: Path, data: Mixture, model: ModelConfig, config: TrainConfig) -> Run:
    if kind_of(root) != "run":
        return create_run(root, data.first.root, model, replace(config, name=root.name))
    return _check_same(root, model, config)


def _check_same(root: Path, model: ModelConfig, config: TrainConfig) -> Run:
    run, its_model, its_config, _ = open_run(root)
    before = {"model": to_dict(its_model), "train": to_dict(its_config)}
    different = differences(before, {"model": to_dict(model), "train": to_dict(config)}, UNIMPORTANT)
    if different:
        raise RunError(
            f"{root} has a run that was started differently: {'; '.join(different)}", "Give another folder with -o"
        )
    return run


def _copy_base_pictures(source: Run, target: Run) -> None:
    """The base model's pictures are the same for every run. A run with other drawing options draws its own."""
    if source.samples(0).is_dir():
        shutil.copytree(source.samples(0), target.samples(0))


def _steps_done(run: Run) -> int:
    with suppress(RunError):  # a damaged file, which is why the run ended
        rows = read_metrics(run.metrics) if run.metrics.is_file() else []
        return max((row["step"] for row in rows if "loss" in row), default=0)
    return 0


def _outcome(label: str, run: Run) -> Outcome:
    names = ("steps", "last_loss", "best_loss", "seconds", "seconds_to_start")
    try:
        result = unseal_if_sealed(read_plain(run.result), [field.name for field in fields(Result)])
        numbers = {name: result[name] for name in names}
        if not all(isinstance(number, int | float | None) for number in numbers.values()):
            raise TypeError("a number is something else")
    except (ValueError, KeyError, TypeError):
        problem = f"{run.result} is not what the run wrote: remove it to train this run again"
        return Outcome(label, str(run.lora), problem=problem)
    try:
        check_recorded(run.lora)
    except RunError as error:
        return Outcome(label, str(run.lora), **numbers, problem=error.problem)
    return Outcome(label, str(run.lora), **numbers)


def _draw_grid(out: Path, sweep_runs: Sequence[SweepRun]) -> Path | None:
    """One grid of the runs that drew the same prompts or pairs: the base model's row, then the last row of each run."""
    labels: list[str] = []
    references = References()
    rows: list[tuple[str, list[Image.Image]]] = []
    for sweep_run in sweep_runs:
        folders = sorted((out / sweep_run.label / "samples").glob("step-*"))
        drawn = read_labels(folders[-1]) if folders else []
        labels = labels or drawn
        if not drawn or drawn != labels:
            continue
        references = references if rows else read_references(out / sweep_run.label) or References()
        labelled = [("base model", folders[0])] if not rows and folders[0].name == "step-000000" else []
        for label, folder in [*labelled, (sweep_run.label, folders[-1])]:
            pictures = read_pictures(folder)
            if pictures and len(pictures) == len(labels):
                rows.append((label, pictures))
    if not rows:
        return None
    target = out / GRID_FILE
    write_whole(target, partial(sheet.grid([*references.above, *rows, *references.below], labels).save, format="PNG"))
    return target
