"""Which run does a command mean: a new one, one that was stopped and goes on, or one that is refused?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.model import ModelConfig, prompt_library
from k5cache.shared.recipe import parse, read, to_dict
from k5train.data.mixture import Mixture, open_mixture
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.options.without_effect import options_without_effect
from k5train.runs.folder import Run, create_run, free_name, is_held, open_run, undone_if_refused, write_recipe
from k5train.runs.resume_state import SavedState, differences, latest_state
from k5train.training.identity import depends_on_the_last_step
from k5train.training.train import Result, train

PARTS = ("transformer", "vae", "scheduler")


def named(caches: Sequence[Path], config: TrainConfig) -> tuple[Path | None, TrainConfig]:
    """The one cache that was named, or the recipe with several as its ``[[train.data]]``.

    Raises:
        RecipeError: the recipe names its own.
    """
    if caches and config.data:
        raise RecipeError(
            f"{caches[0]} is given, and the recipe names its caches in [[train.data]]", "Leave one of the two out"
        )
    if len(caches) <= 1:
        return (caches[0] if caches else None), config
    return None, replace(config, data=tuple(DataConfig(cache=str(c), repeats=config.repeats) for c in caches))


def start(cache: Path | None, config: TrainConfig, out: Path | None, model: ModelConfig, is_new: bool) -> Result:
    """Train: a new run, or the one that the same command started and that was stopped before its end.

    Args:
        cache: None: the recipe's ``[[train.data]]``.
        out: the run's folder. None: ``runs/<train.name>``, or else ``runs/<name of the cache>``, ``-2``, ``-3`` ...
        is_new: never go on with a stopped run.

    Raises:
        RunError: the folder is taken by a finished run or by one with another recipe.
    """
    config = with_library(config)
    for line in options_without_effect(config):
        console.warn(line)
    data = open_data(cache, config)
    folder = model_folder(model, PARTS)
    run = _unfinished(data, out, model, config) if not is_new else None
    if run:
        console.note(f"{run.root} was stopped before its end: going on. --new starts another", "bold")
        return train(data, folder, replace(config, name=run.name), run)
    target = out or (Path("runs") / config.name if config.name else None)
    target = target or free_name(Path("runs"), data.first.root.resolve().name)
    config = replace(config, name=target.name)
    with undone_if_refused(create_run(target, data.first.root, model, config)) as run:
        return train(data, folder, config, run)


def resume(root: Path, options: list[str], cache: Path | None) -> Result:
    """Go on with a run from its last saved state, exactly as if it had not stopped.

    Args:
        options: ``table.key=value`` over the run's recipe; what would change the numbers is refused.
        cache: where the cache is now, if it moved.

    Raises:
        RunError: it is finished, or was started differently.
    """
    run, _, _, first = open_run(root)
    model, config = parse(
        read(root / "recipe.toml", options), {"model": ModelConfig, "train": TrainConfig}, root / "recipe.toml"
    )
    config = with_library(config)
    if cache is None and not config.data and not first.exists():
        moved = console.command("k5train", "resume", root, cache="PATH")
        raise RunError(f"{root} was trained on {first}, which is not there", f"If it moved: {moved}")
    lost = [entry.cache for entry in config.data if cache is None and not Path(entry.cache).exists()]
    if lost:
        moved = console.command("k5train", "resume", root, set=f"train.data={_as_moved(config.data, lost)}")
        raise RunError(f"{root} was trained on {lost[0]}, which is not there", f"If it moved, with its PATH: {moved}")
    data = open_data(cache or (None if config.data else first), config)
    saved = latest_state(run.state)
    if run.is_finished and saved and config.epochs is None and saved.progress.step >= config.steps:
        raise RunError(f"{root} is finished, at step {saved.progress.step}", further(run, config, data, saved))
    if run.is_finished and saved:
        check_may_go_on(run, config, saved)
    # Before it trains: stopped again, it is to go on as it was told now.
    accepted = partial(write_recipe, root, model, config) if options else None
    return train(data, model_folder(model, PARTS), config, run, accepted=accepted)


def _as_moved(entries: Sequence[DataConfig], lost: Sequence[str]) -> str:
    """``[[train.data]]`` in one line, with PATH for what is not there."""
    tables = []
    for entry in entries:
        values = {**to_dict(entry), "cache": "PATH" if entry.cache in lost else entry.cache}
        defaults = to_dict(DataConfig(cache=""))
        kept = {k: v for k, v in values.items() if v != defaults.get(k)}
        tables.append("{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in kept.items()) + "}")
    return f"[{', '.join(tables)}]"


def check_may_go_on(run: Run, config: TrainConfig, saved: SavedState) -> None:
    """Refuse a run that would end at once for the reason for which it ended.

    Raises:
        RunError: its time is spent, or its patience; says which option gives it more.
    """
    hours, step = config.max_hours, saved.progress.step
    if hours and saved.progress.seconds >= 3600 * hours:
        more = console.command("k5train", "resume", run.root, set=f"train.max_hours={2 * hours:g}")
        raise RunError(f"{run.root} ended at step {step} after the time it was given, {hours:g} h", f"For more: {more}")
    patience = config.validation.patience
    if patience and saved.progress.not_better >= patience:
        more = console.command("k5train", "resume", run.root, set="train.validation.patience=0")
        raise RunError(
            f"{run.root} ended at step {step}: {patience} times the held-out loss had not fallen",
            f"To go on all the same: {more}",
        )


def further(run: Run, config: TrainConfig, data: Mixture, saved: SavedState) -> str:
    """What to do with a finished run that is not enough."""
    if not depends_on_the_last_step(to_dict(config)):
        more = console.command("k5train", "resume", run.root, set=f"train.steps={2 * saved.progress.step}")
        return f"To train it further: {more}"
    if config.lora.algo in ("dora", "lokr"):
        return "Train another for more steps: its schedule has come to its end"
    # The schedule has come to its end: another one begins where the LoRA is.
    caches = [] if config.data else [data.first.root]
    start, out = f"train.lora.init_lora={run.lora}", f"{run.root}-2"
    more = console.command("k5train", "run", *caches, recipe=run.root / "recipe.toml", out=out, set=start)
    return f"Its schedule has come to its end. To start another from its LoRA: {more}"


def open_data(cache: Path | None, config: TrainConfig) -> Mixture:
    """The caches of a run: one that was named, or those of its recipe."""
    return open_mixture(config.data if cache is None else [DataConfig(cache=str(cache), repeats=config.repeats)])


def with_library(config: TrainConfig) -> TrainConfig:
    """The recipe with the prompts of its library in it: a run's own recipe needs no other file."""
    chosen = config.validation
    if chosen.prompt_library is None:
        return config
    prompts = tuple(dict.fromkeys([*chosen.prompts, *prompt_library(Path(chosen.prompt_library))]))
    return replace(config, validation=replace(chosen, prompts=prompts, prompt_library=None))


def _unfinished(data: Mixture, out: Path | None, model: ModelConfig, config: TrainConfig) -> Run | None:
    """The run that this same command started, where it was stopped. The newest, if there are several."""
    if out or config.name:
        candidates = [out or Path("runs") / str(config.name)]
    else:
        name = data.first.root.resolve().name
        candidates = [Path("runs") / name, *Path("runs").glob(f"{name}-*")]
    candidates = [c for c in candidates if (c / "run.json").is_file()]
    for candidate in sorted(candidates, key=lambda c: (c / "run.json").stat().st_mtime, reverse=True):
        run, its_model, its_config, cache = open_run(candidate)
        if run.is_finished or is_held(run):
            continue
        different = differences(_plain(its_model, its_config), _plain(model, config), ["train.name"])
        if not different and cache.resolve() == data.first.root.resolve():
            return run
        if out or config.name:
            what = "; ".join(different) or f"cache: {cache}, now {data.first.root}"
            raise RunError(
                f"{candidate} holds a run that was stopped, and was started differently: {what}",
                f"Go on with it as it was: k5train resume {candidate}, or give another folder with -o",
            )
    return None


def _plain(model: ModelConfig, config: TrainConfig) -> dict[str, Any]:
    return {"model": to_dict(model), "train": to_dict(config)}
