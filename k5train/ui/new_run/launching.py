"""How does a recipe become a run or a sweep? As a job of the queue, which runs the command that a person would type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from k5cache.shared.errors import K5Error, OutputError, RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.inside import name_problem
from k5cache.shared.origins import Document
from k5cache.shared.recipe import parse_toml, to_dict
from k5cache.shared.units import count_of
from k5train.options.train import TrainConfig
from k5train.ui.jobs import queue
from k5train.ui.jobs.job import Job
from k5train.ui.listing import Entry
from k5train.ui.new_run import to_encode
from k5train.ui.new_run.allowed import local, models_of, path_problems
from k5train.ui.new_run.checked import check
from k5train.ui.new_run.fields import LEFT_OUT, value_in
from k5train.ui.project import Project

_RECIPE = "{job}/recipe.toml"
_MOST_RUNS = 200


def start(project: Project, text: str, name: str, caches: Sequence[Entry]) -> Job:
    """Put a run into the queue, which begins it as soon as a GPU is free.

    Args:
        text: its recipe.
        name: of its folder under ``runs/``.

    Raises:
        K5Error: the recipe has a problem, no cache is chosen, or the name is taken or cannot be one. Then nothing
            is written.
    """
    config = _check_recipe(project, text, caches)
    target = check_name(project, name, "run")
    _encode_first(project, config, text, caches, name)
    argv = ["k5train", "run", *_named(text, caches), "--recipe", _RECIPE, "--out", target]
    uses = tuple(cache.relative for cache in caches)
    return queue.add(project, argv, f"run {name}", "run", target, files={"recipe.toml": text}, uses=uses)


def start_sweep(
    project: Project, text: str, name: str, caches: Sequence[Entry], axes: Sequence[tuple[str, str]], gpus: int = 1
) -> Job:
    """Put a sweep into the queue. Raises as ``start``, and if its options or values cannot be swept over.

    Args:
        axes: options and their values, with commas: ``("train.lora.rank", "8,16")``.
        gpus: how many runs are trained at a time, each on a GPU of its own. The job waits for as many.
    """
    config = _check_recipe(project, text, caches)
    if len(caches) > 1:
        raise RecipeError(
            "A sweep trains on one cache, and several are chosen", "Choose one, or write [[train.data]] in the recipe"
        )
    grid = [f"{option}={values}" for option, values in axes]
    count_runs(project, text, grid, models_of(project, [cache.path for cache in caches]))
    target = check_name(project, name, "sweep")
    _encode_first(project, config, text, caches, name)
    options = [word for line in grid for word in ("--grid", line)]
    options += ["--gpus", str(gpus)] if gpus > 1 else []
    argv = ["k5train", "sweep", *_named(text, caches), "--recipe", _RECIPE, *options, "--out", target]
    uses = tuple(cache.relative for cache in caches)
    return queue.add(project, argv, f"sweep {name}", "sweep", target, files={"recipe.toml": text}, uses=uses)


def count_runs(project: Project, text: str, grid: Sequence[str], models: Sequence[str] = ()) -> int:
    """How many runs a sweep has.

    Raises:
        RecipeError: an option or a value cannot be swept over.
    """
    from k5train.training.sweep_runs import sweep_runs

    if math.prod(line.count(",") + 1 for line in grid) > _MOST_RUNS:
        raise RecipeError(f"That may be more than {_MOST_RUNS} runs", "Give fewer values")
    document = Document(parse_toml(text, "The recipe", "Correct that line"), Path("recipe"), text)
    library = value_in(document, "train.validation.prompt_library")
    if isinstance(library, str):  # it is read to compare the runs, from the project's folder
        document["train"]["validation"]["prompt_library"] = str(project.inside(Path(library)))
    try:
        model, runs = sweep_runs(document, grid, None)
    except RecipeError as error:
        raise RecipeError(error.problem.replace("--grid ", ""), error.fix.replace("--grid ", "")) from error
    for run in runs:
        wrong = path_problems(project, {"model": to_dict(model), "train": to_dict(run.config)}, models)
        if wrong:
            raise RecipeError(wrong[0].text, "Sweep over other values")
    return len(runs)


def check_name(project: Project, name: str, kind: str) -> str:
    """The folder of a new run or sweep, from the project.

    Raises:
        RecipeError: the name cannot be one.
        OutputError: there is something of this name already, also in the queue.
    """
    from k5train.runs.folder import check_new

    if problem := name_problem(name):
        raise RecipeError(f"The name of the {kind} {problem}", "Give a name such as cats-r32")
    target = f"{kind}s/{name}"
    folder = project.inside(Path(target))
    if folder.exists() or folder.is_symlink():
        raise OutputError(
            f"{target} is there already", f"Choose another name, such as {free_name(project, name, kind)}"
        )
    if any(job.about == target for job in _unfinished(project)):
        raise OutputError(f"A {kind} named {shown(name)} waits in the queue", "Choose another name")
    try:
        check_new(folder)
    except K5Error as error:
        raise type(error)(error.problem.replace(f"{project.root}/", ""), "Choose another name") from error
    return target


def free_name(project: Project, name: str, kind: str = "run") -> str:
    """``name``, or ``name-2``, ``-3`` ... of which neither the project nor its queue has a run or a sweep."""
    taken = {job.about for job in _unfinished(project)}
    candidate, number = name, 2
    while f"{kind}s/{candidate}" in taken or (project.root / f"{kind}s" / candidate).exists():
        candidate, number = f"{name}-{number}", number + 1
    return candidate


def _unfinished(project: Project) -> list[Job]:
    return [job for job in queue.jobs(project) if job.state in ("waiting", "running")]


def _named(text: str, caches: Sequence[Entry]) -> list[str]:
    return [] if names_caches(text) else [cache.relative for cache in caches]


def names_caches(text: str) -> bool:
    """Whether a recipe names its caches itself, in ``[[train.data]]``."""
    value = value_in(parse_toml(text, "The recipe", "Correct that line"), "train.data")
    return value is not LEFT_OUT and bool(value)


def _encode_first(project: Project, config: TrainConfig, text: str, caches: Sequence[Entry], name: str) -> None:
    """Put before a run what it draws and its cache lacks. The run waits for jobs about its caches."""
    cache = caches[0].relative if caches and not names_caches(text) else config.data[0].cache
    for argv in to_encode.commands(project, config, cache):
        queue.add(project, argv, f"prompts for {name}", "prompts", local(project, cache))


def _check_recipe(project: Project, text: str, caches: Sequence[Entry]) -> TrainConfig:
    checked = check(project, text, models_of(project, [cache.path for cache in caches]))
    if checked.problems:
        more = len(checked.problems) - 1
        others = f"; and {count_of(more, 'more problem')}" if more else ""
        raise RecipeError(f"{checked.problems[0].text}{others}", checked.problems[0].fix or "Correct that in the form")
    if not caches and not names_caches(text):
        raise RecipeError("No cache is chosen", "Choose one; the Data page makes one of pictures")
    assert checked.config is not None
    return checked.config
