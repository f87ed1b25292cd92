"""What is in the folder of a sweep: may runs be added to it, how did each one end, and what do their pictures show?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from k5cache.shared import console
from k5cache.shared.errors import K5Error, RecipeError, RunError
from k5cache.shared.files import write_whole
from k5cache.shared.inside import check_inside, name_problem
from k5cache.shared.model import ModelConfig
from k5cache.shared.outputs import HARMLESS, check_folder, check_writable, kind_of
from k5cache.shared.plain import read_plain
from k5cache.shared.sealed import unseal_if_sealed
from k5train.options.train import FIXED, BaseModelPrecision, TrainConfig
from k5train.pictures import sheet
from k5train.pictures.compared import compare_pictures
from k5train.pictures.saved import read_pictures
from k5train.runs.compared import remarks
from k5train.runs.differences import differences
from k5train.runs.folder import Run, check_new, open_run
from k5train.runs.outcomes import FILE, NOT_FINISHED, Outcome, read_outcomes
from k5train.runs.recipe import comparable
from k5train.runs.record import UNSEALED_RESULT, Loss, Record, read_record
from k5train.runs.written import check_recorded
from k5train.training.sweep_runs import SweepRun

GRID_FILE = "samples.png"
"""Further grids, of runs that drew other prompts, are ``samples-2.png``, ``samples-3.png`` ..."""


@dataclass(frozen=True)
class Place:
    """What all runs of a sweep have in common."""

    cache: Path | None
    """None: the recipe names the caches."""
    out: Path
    model: ModelConfig
    folder: Path
    """The checkpoint."""


def check_out(out: Path, cache: Path, model: ModelConfig, sweep_runs: Sequence[SweepRun]) -> None:
    """Refuse a folder to which these runs cannot be added, and all of their own folders, before the first run begins.

    Args:
        cache: the first cache of the runs.

    Raises:
        OutputError: it holds something else, or cannot be written.
        RunError: it has runs on another base or cache, or runs of these names that were started differently.
    """
    labels = {sweep_run.label for sweep_run in sweep_runs}

    def is_unfinished(folder: Path) -> bool:
        """Whether it holds only runs of this sweep: until its end, an earlier version wrote nothing else."""
        entries = [entry for entry in folder.iterdir() if not HARMLESS.fullmatch(entry.name) and entry.name != ".lock"]
        return all(entry.name in labels and kind_of(entry) == "run" for entry in entries)

    check_folder(out, "sweep", is_unfinished)
    check_inside(out, (".lock", FILE, GRID_FILE, *labels))
    check_writable(out)
    for sweep_run in sweep_runs:
        problem = name_problem(sweep_run.label)
        if problem:
            raise RecipeError(f"The name of a run of a sweep {problem}", "Give it another name in a --list")
        if sweep_run.label in (FILE, GRID_FILE):
            raise RecipeError(f"A run of a sweep cannot be called {sweep_run.label}", "Give it another name")
        root = out / sweep_run.label
        if kind_of(root) == "run":
            run = open_same(root, cache, model, sweep_run.config)
            if sweep_run.config.deterministic and not open_run(run.root)[2].deterministic:
                console.warn(f"{root} was trained with train.deterministic=false: its last bits are not this sweep's")
        else:
            check_new(root)
    for root in runs_in(out):
        if root.name not in labels:
            _check_same_base(root, cache, model, sweep_runs[0].config)


def runs_in(out: Path) -> list[Path]:
    """The folders of all runs in a sweep's folder."""
    return sorted(entry for entry in out.iterdir() if kind_of(entry) == "run") if out.is_dir() else []


def precision_in(out: Path) -> BaseModelPrecision | None:
    """The precision of the runs in a sweep's folder, which share a base. None: there are none that can be read."""
    with suppress(OSError):  # check_out says what is wrong with the folder
        for root in runs_in(out):
            with suppress(K5Error):
                return open_run(root)[2].base_model_precision
    return None


def open_same(root: Path, cache: Path, model: ModelConfig, config: TrainConfig) -> Run:
    """A run that the same options started. It may since have gone on without being deterministic.

    Raises:
        RunError: others did; names them.
    """
    run, its_model, its_config, its_cache = open_run(root)
    before, now = comparable(its_model, its_config), comparable(model, config)
    free = ["train.name", *(["train.deterministic"] if config.deterministic else [])]
    different = differences(before, now, free) + _cache_differs(its_cache, cache, config)
    if different:
        raise RunError(
            f"{root} has a run that was started differently: {'; '.join(different)}",
            "Give these options the values that they had, or another folder with -o, or other names with --list",
        )
    return run


def _check_same_base(root: Path, cache: Path, model: ModelConfig, config: TrainConfig) -> None:
    try:
        _, its_model, its_config, its_cache = open_run(root)
    except K5Error:  # a damaged one is named in the table
        return
    before, now = comparable(its_model, its_config), comparable(model, config)
    for document in (before, now):
        document["train"] = {name: value for name, value in document["train"].items() if name in FIXED}
    free = ["train.name", "train.device", "train.memory"]
    different = differences(before, now, free) + _cache_differs(its_cache, cache, config)
    if different:
        raise RunError(
            f"{root.parent} is a sweep over another base or cache: {'; '.join(different)}",
            "Give another folder with -o. `k5train compare` compares the runs of several folders",
        )


def _cache_differs(before: Path, now: Path, config: TrainConfig) -> list[str]:
    """A line if the runs are of two caches. One that is not there any more has moved: its rows are compared later."""
    if config.data or not before.exists() or before.resolve() == now.resolve():
        return []
    return [f"cache: {before}, now {now}"]


def outcomes_before(out: Path, labels: Sequence[str]) -> dict[str, Outcome]:
    """How the runs that are in the folder already have ended, also those that are not part of the sweep now.

    Args:
        labels: of the sweep now. Those of them that are not on the list of ``sweep.json`` are left out.
    """
    known = {outcome.label: outcome for outcome in read_outcomes(out)}
    there = [root.name for root in runs_in(out) if root.name not in known and root.name not in labels]
    return {label: _brought_up_to_date(out / label, known.get(label)) for label in [*known, *there]}


def _brought_up_to_date(root: Path, known: Outcome | None) -> Outcome:
    if known and not root.is_dir():
        return replace(known, problem=known.problem or f"{root} is not there any more")
    return outcome_of(root, known.error if known and not Run(root).is_finished else None)


def outcome_of(root: Path, problem: str | None = None) -> Outcome:
    """How a run in a sweep's folder ended, by its own files.

    Args:
        problem: the error that ended it.
    """
    run, record = Run(root), read_record(root)
    result = _result(run)
    own = "; ".join(record.problems)
    if own and run.is_finished and not result:
        own += f". To train it again, move {root} away"
    return Outcome(
        root.name,
        _below(root.parent, _lora_of(run, record)),
        record.steps,
        last_loss=result.get("last_loss"),
        base_loss=_loss(record.base),
        final_loss=_loss(record.final),
        best_loss=_loss(record.best),
        best_step=record.best.step if record.best else None,
        best_lora=_below(root.parent, record.best.file) if record.best and record.best.file else None,
        ema_loss=_loss(record.ema),
        base_probe_loss=record.first("probe"),
        probe_loss=record.last("probe"),
        seconds=record.seconds,
        seconds_to_start=result.get("seconds_to_start"),
        problem=problem or own or _problem_of(run, record),
        remarks=tuple(
            remark for remark in remarks(replace(record, problems=())) if not remark.startswith(NOT_FINISHED)
        ),
    )


def _problem_of(run: Run, record: Record) -> str | None:
    if not run.is_finished:
        return f"{NOT_FINISHED}: step {record.steps} of {record.settings.get('train.steps', '?')}"
    lora = _lora_of(run, record)
    if not lora.is_file():
        return f"{lora} is not there"
    try:
        check_recorded(lora)
    except RunError as error:
        return error.problem
    return None


def _lora_of(run: Run, record: Record) -> Path:
    """The finished LoRA, which has the name that the run's folder had when it ended."""
    return record.lora or run.lora


def _result(run: Run) -> Mapping[str, float]:
    """The numbers of ``result.json`` that are not in the metrics. Empty if it cannot be read."""
    try:
        result = unseal_if_sealed(read_plain(run.result), UNSEALED_RESULT)
    except (OSError, ValueError):
        return {}
    names = ("last_loss", "seconds_to_start")
    return {name: result[name] for name in names if isinstance(result.get(name), int | float)}


def _loss(loss: Loss | None) -> float | None:
    return loss.loss if loss else None


def _below(out: Path, path: Path) -> str:
    return path.relative_to(out).as_posix()


def draw_grids(out: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """Grids of the last pictures of every finished run, and of its average, below the base model's.

    There is one grid for each way in which the runs drew: what stands in one is on the same noise.
    """
    records = [read_record(out / outcome.label) for outcome in outcomes if not outcome.problem]
    written: list[Path] = []
    while records:
        compared = compare_pictures(records)
        read = [(row.label, read_pictures(row.folder)) for row in compared.rows]
        rows: list[tuple[str, list[Image.Image]]] = [(label, pictures) for label, pictures in read if pictures]
        if not rows:
            break
        target = out / (GRID_FILE if not written else f"samples-{len(written) + 1}.png")
        write_whole(target, partial(sheet.grid(rows, compared.columns).save, format="PNG"))
        written.append(target)
        records = [record for record in records if record.name in compared.left_out]
    if len(written) > 1:
        console.note(f"The runs did not all draw the same pictures in the same way: there are {len(written)} grids")
    return written
