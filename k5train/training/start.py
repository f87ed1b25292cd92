"""Does a command start a new run, continue a stopped one, or is it refused?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from k5cache.shared import console, places
from k5cache.shared.checkpoint import check_known, model_folder
from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.inside import as_file_names, name_problem
from k5cache.shared.model import ModelConfig, named_prompts
from k5cache.shared.outputs import check_writable, kind_of
from k5cache.shared.recipe import to_dict
from k5cache.shared.units import count_of
from k5train.data.kind import check_options
from k5train.data.mixture import Mixture, open_mixture
from k5train.forward.precision import announce, decided
from k5train.options.data import DataConfig
from k5train.options.precision import is_open, with_precision
from k5train.options.rate import with_usual_rate
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks
from k5train.pictures.drawings import note_sizes
from k5train.runs.differences import differences
from k5train.runs.folder import (
    Run,
    check_new,
    free_name,
    is_locked,
    name_of,
    new_run,
    open_run,
)
from k5train.runs.recipe import comparable, write_recipe
from k5train.runs.resume_state import SavedState, latest_state
from k5train.training.cautions import cautions
from k5train.training.identity import depends_on_the_last_step
from k5train.training.overwriting import CANNOT_START_A_RUN, start_another
from k5train.training.result import Result
from k5train.training.train import check_recipe, check_start, train

PARTS = ("transformer", "vae", "scheduler")
UNIMPORTANT = ("train.name", "train.validation.prompt_names")
"""Options by which a run is not another one: earlier versions kept no names of prompts."""


def named(caches: Sequence[Path], config: TrainConfig) -> tuple[Path | None, TrainConfig]:
    """The cache that the command names. If it names several, None and the recipe with these as its ``[[train.data]]``.

    Raises:
        RecipeError: the recipe has caches of its own.
    """
    if caches and config.data:
        raise RecipeError(
            f"{caches[0]} is given, and the recipe names its caches in [[train.data]]", "Leave one of the two out"
        )
    if len(caches) <= 1:
        return (caches[0] if caches else None), config
    return None, replace(config, data=tuple(_entry(cache, config) for cache in caches))


def start(
    cache: Path | None, config: TrainConfig, out: Path | None, model: ModelConfig, is_new: bool, ranks: Ranks = ALONE
) -> Result:
    """Train a new run, or go on with the one that the same command started and that was stopped before its end.

    Args:
        cache: None: the recipe's ``[[train.data]]``.
        out: the run's folder. None: ``runs/<train.name>``, or else ``runs/<name of the cache>``, ``-2``, ``-3`` ...
        is_new: never go on with a stopped run.
        ranks: the processes that train together, of which this is the first.

    Raises:
        RecipeError: ``train.name`` is not the name of one folder.
        RunError: the folder has a finished run, or a run with another recipe.
        OutputError: the folder holds something else, or cannot be written. This is found before anything is read.
    """
    problem = name_problem(config.name) if config.name is not None and out is None else None
    if problem:
        raise RecipeError(f"train.name {problem}", "Give a name such as my_run, or a folder with -o")
    target = out or (Path("runs") / config.name if config.name else None)
    if target and kind_of(target) != "run":
        check_new(target)
    data = open_data(cache, config)
    check_options(data, config)
    config = resolved(config)
    for line in cautions(config, data, model, ranks.size):
        console.warn(line)
    unfinished = _unfinished(data, out, model, config) if not is_new else None
    if unfinished:
        run, config = unfinished
        console.note(f"{run.root} was stopped before its end: going on. --new starts another run", "bold")
        return train(data, model_folder(model, PARTS), replace(config, name=run.name), run, ranks=ranks)
    target = target or free_name(Path("runs"), data.first.root.resolve().name)
    check_new(target)
    if not out and not config.name and target.name != data.first.root.resolve().name:
        console.note(f"This run goes to {target}: {target.with_name(data.first.root.resolve().name)} is there already")
    note_sizes(data.first, config.validation)
    folder = model_folder(model, PARTS)
    config = decide_precision(replace(config, name=name_of(target)), data, folder)
    with new_run(target, data.first.root, model, config) as run:
        return train(data, folder, config, run, ranks=ranks)


def resume(root: Path, options: list[str], cache: Path | None, step: int | None = None, ranks: Ranks = ALONE) -> Result:
    """Go on with a run from its last saved state, exactly as if it had not stopped.

    Args:
        options: ``table.key=value``, which override the run's recipe. What would change the numbers is refused.
        cache: where the cache is now, if it has moved.
        step: go on from the state of this step and not from the newest; a finished run may.
        ranks: the processes that train together, of which this is the first.

    Raises:
        RunError: the run is finished, was started differently, or its cache is not there.
    """
    run, model, config, recorded_cache = open_run(root, options)
    _check_accumulation(root, config, options)
    if is_open(config):  # by an option, as a run's own recipe has what was decided
        config = with_precision(config, open_run(root)[2].base_model_precision)
    check_writable(root)
    if not any(option.startswith("model.") for option in options):
        asked = [f"model.path={model.source}", *([f"model.revision={model.revision}"] if model.revision else [])]
        check_known(model, root, f"If you trust it: {console.this_command(set=asked)}")
    _check_caches_exist(root, config, cache, recorded_cache)
    data = open_data(cache or (None if config.data else recorded_cache), config)
    check_options(data, config)
    config = resolved(config)
    saved = latest_state(run.state, step)
    if step is None and run.is_finished and saved and run.lora.is_file():  # a LoRA that was deleted is written again
        if config.epochs is None and saved.progress.step >= config.steps:
            raise RunError(
                f"{root} is finished, at step {saved.progress.step}", how_to_train_further(run, config, data, saved)
            )
        check_may_go_on(run, config, saved)
    # Written before training, so that a run that is stopped again goes on with these options.
    accepted = partial(write_recipe, root, model, config, cache)
    return train(data, model_folder(model, PARTS), config, run, accepted=accepted, step=step, ranks=ranks)


def _check_accumulation(root: Path, config: TrainConfig, options: Sequence[str]) -> None:
    """Refuse another accumulation: what each GPU does follows from what an update had, and from their number."""
    was = open_run(root)[2].gradient_accumulation_steps if options else config.gradient_accumulation_steps
    if was != config.gradient_accumulation_steps:
        raise RunError(
            f"The run in {root} was started differently: train.gradient_accumulation_steps: {was}, now"
            f" {config.gradient_accumulation_steps}",
            "Change that back to resume the run, or start another one: k5train run --new, or -o OTHER",
        )


def _check_caches_exist(root: Path, config: TrainConfig, cache: Path | None, recorded_cache: Path) -> None:
    if cache is not None:
        return
    if not config.data and not places.is_there(recorded_cache):
        command = console.command("k5train", "resume", root, cache="PATH")
        raise RunError(f"{root} was trained on {recorded_cache}, which is not there", f"If it has moved: {command}")
    missing = [entry.cache for entry in config.data if not places.is_there(Path(entry.cache))]
    if missing:
        command = console.command(
            "k5train", "resume", root, set=f"train.data={_with_paths_to_fill_in(config.data, missing)}"
        )
        raise RunError(
            f"{root} was trained on {missing[0]}, which is not there", f"If it has moved, fill in PATH: {command}"
        )


def _with_paths_to_fill_in(entries: Sequence[DataConfig], missing: Sequence[str]) -> str:
    """``[[train.data]]`` in one line, with PATH for the caches that are missing."""
    tables = []
    for entry in entries:
        values = {**to_dict(entry), "cache": "PATH" if entry.cache in missing else entry.cache}
        defaults = to_dict(DataConfig(cache=""))
        given = {k: v for k, v in values.items() if v != defaults.get(k)}
        tables.append("{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in given.items()) + "}")
    return f"[{', '.join(tables)}]"


def check_may_go_on(run: Run, config: TrainConfig, saved: SavedState) -> None:
    """Refuse a run that would stop at once, for the reason for which it stopped before.

    Raises:
        RunError: its time or its patience is used up; says which option to change.
    """
    hours, step = config.max_hours, saved.progress.step
    if hours and saved.progress.seconds >= 3600 * hours:
        command = console.command("k5train", "resume", run.root, set=f"train.max_hours={2 * hours:g}")
        raise RunError(
            f"{run.root} stopped at train.max_hours={hours:g}, after {count_of(step, 'step')}",
            f"To give it more time: {command}",
        )
    patience = config.validation.patience
    if patience and saved.progress.not_better >= patience:
        command = console.command("k5train", "resume", run.root, set="train.validation.patience=0")
        times = "in the last measurement" if patience == 1 else f"in {patience} measurements in a row"
        raise RunError(
            f"{run.root} stopped early at step {step}: the held-out loss did not improve {times}",
            f"To go on all the same: {command}",
        )


def how_to_train_further(run: Run, config: TrainConfig, data: Mixture, saved: SavedState) -> str:
    """The command that trains a finished run, or its LoRA, further."""
    if not depends_on_the_last_step(to_dict(config)):
        command = console.command("k5train", "resume", run.root, set=f"train.steps={2 * saved.progress.step}")
        return f"To train it further: {command}"
    if config.lora.algo in CANNOT_START_A_RUN:
        return "Its schedule has ended. Train another run for more steps"
    return f"Its schedule has ended. {start_another(run, data, config)}"


def open_data(cache: Path | None, config: TrainConfig) -> Mixture:
    """The caches of a run: the one that the command names, or those of its recipe."""
    return open_mixture(config.data if cache is None else [_entry(cache, config)])


def _entry(cache: Path, config: TrainConfig) -> DataConfig:
    return DataConfig(cache=str(cache), repeats=config.repeats, repeats_by_folder=config.repeats_by_folder)


def resolved(config: TrainConfig) -> TrainConfig:
    """The recipe with what its run is to keep: the prompts of its library, and a number for the learning rate."""
    return with_usual_rate(with_library(config))


def with_library(config: TrainConfig) -> TrainConfig:
    """The recipe with the prompts of its library and their names in it, so that a run's recipe needs no other file."""
    validation = config.validation
    if validation.prompt_library is None:
        return config
    own = zip(validation.prompts, validation.prompt_names or ("",) * len(validation.prompts), strict=True)
    names: dict[str, str] = {}
    for prompt, name in [*own, *((prompt, name) for name, prompt in named_prompts(Path(validation.prompt_library)))]:
        names.setdefault(prompt, name)
    cleaned = iter(as_file_names(name for name in names.values() if name))
    prompt_names = tuple(next(cleaned) if name else "" for name in names.values())
    changed = replace(validation, prompts=tuple(names), prompt_names=prompt_names if any(prompt_names) else (),
                      prompt_library=None)  # fmt: skip
    return replace(config, validation=changed)


def decide_precision(config: TrainConfig, data: Mixture, folder: Path) -> TrainConfig:
    """The recipe with the precision that ``auto`` means on this machine.

    torch is imported only if the GPU decides, and after everything that can be refused without it.
    """
    if not is_open(config):
        return config
    check_recipe(data, folder, config)
    check_start(config)
    config = decided(config)
    announce(config.base_model_precision)
    return config


def _unfinished(
    data: Mixture, out: Path | None, model: ModelConfig, config: TrainConfig
) -> tuple[Run, TrainConfig] | None:
    """The stopped run that this same command started, and the recipe to go on with. The newest if there are several."""
    if out or config.name:
        candidates = [out or Path("runs") / str(config.name)]
    else:
        name = data.first.root.resolve().name
        candidates = [Path("runs") / name, *Path("runs").glob(f"{name}-*")]
    candidates = [c for c in candidates if kind_of(c) == "run"]
    for candidate in sorted(candidates, key=lambda c: (c / "run.json").stat().st_mtime, reverse=True):
        if Run(candidate).is_finished:
            continue
        run, its_model, its_config, cache = open_run(candidate)
        if is_locked(run):
            continue
        as_it = with_precision(config, its_config.base_model_precision)  # auto was decided when it began
        different = differences(comparable(its_model, its_config), comparable(model, as_it), UNIMPORTANT)
        if not different and places.comparable(str(cache)) == places.comparable(str(data.first.root)):
            return run, as_it
        if out or config.name:
            changes = "; ".join(different) or f"cache: {cache}, now {data.first.root}"
            as_it_was = console.command("k5train", "resume", candidate)
            raise RunError(
                f"{candidate} has a run that was stopped, and was started differently: {changes}",
                f"Resume it as it was: {as_it_was}, or give another folder with -o",
            )
    return None
