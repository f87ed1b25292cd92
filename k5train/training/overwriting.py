"""May a run write its LoRAs? Never over a file that it did not make, whatever else is missing from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.errors import K5Error, RunError
from k5train.adapter.header import read_metadata
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.runs.folder import Run
from k5train.runs.metrics import read_metrics
from k5train.runs.resume_state import SavedState
from k5train.runs.written import is_as_recorded, recorded_files
from k5train.training.identity import is_made_by

CANNOT_START_A_RUN = ("dora", "lokr")
"""Adapters whose files ``train.lora.init_lora`` does not read."""


def check_overwrites(
    run: Run, saved: SavedState | None, data: Mixture, config: TrainConfig, identity: Mapping[str, Any]
) -> None:
    """Refuse to train a run if that would overwrite a LoRA that it did not make, or one that it cannot make again.

    Args:
        saved: where the run goes on. None: it begins.
        identity: of the run as it is now.

    Raises:
        RunError: names the file, and what to do.
    """
    if saved is None:
        check_beginning(run, data, config)
        _say_what_was_lost(run)
    step = saved.progress.step if saved and not config.checkpoints_total_limit else 0
    later = [path for number, path in run.checkpoints().items() if number >= step]
    for path in (run.lora, run.best, run.ema, *later):
        if path.is_file() and not _is_made_by(path, run, identity):
            raise RunError(
                f"{path} is not a file that this run wrote, or it was changed, and training would overwrite it",
                f"To keep it: {console.command('mv', path, f'{path}.kept')}",
            )


def check_beginning(run: Run, data: Mixture, config: TrainConfig) -> None:
    """Refuse to begin a run that has trained already and lost its state.

    The first state is written before the first checkpoint, so a run that was stopped before it has no LoRA but that
    with the lowest held-out loss.

    Raises:
        RunError: it is finished, or has LoRAs; gives the command of another run.
    """
    if run.is_finished:
        raise RunError(
            f"{run.root} is finished, and its saved state was removed, so it cannot go on from where it ended",
            start_another(run, data, config),
        )
    loras = [path for path in (run.lora, run.ema, *run.checkpoints().values()) if path.is_file()]
    loras += [path for path in recorded_files(run.root) if path != run.best]
    if loras:
        raise RunError(
            f"{run.root} has no saved state to go on from, and beginning again would overwrite {loras[0]}",
            start_another(run, data, config),
        )


def _say_what_was_lost(run: Run) -> None:
    step = max((row["step"] for row in _rows(run)), default=0)
    if step:
        console.warn(f"{run.root} was stopped at step {step} and has no saved state: it begins again at step 0")


def start_another(run: Run, data: Mixture, config: TrainConfig) -> str:
    """The command of another run with this one's recipe, which starts from its LoRA if it can."""
    caches = [] if config.data else [data.first.root]
    loras = [path for path in (run.lora, run.best, *reversed(run.checkpoints().values())) if path.is_file()]
    starts = bool(loras) and config.lora.algo not in CANNOT_START_A_RUN
    option = f"train.lora.init_lora={loras[0]}" if starts else None
    recipe, out = run.root / "recipe.toml", f"{run.root}-2"
    command = console.command("k5train", "run", *caches, recipe=recipe, out=out, set=option)
    return f"To start another run{' from its LoRA' if starts else ' with its recipe'}: {command}"


def _rows(run: Run) -> Sequence[Mapping[str, Any]]:
    try:
        return read_metrics(run.metrics) if run.metrics.is_file() else []
    except RunError:
        return []


def _is_made_by(path: Path, run: Run, identity: Mapping[str, Any]) -> bool:
    """Whether a LoRA is this run's: by its checksum, or, where there is none, by what it says of itself."""
    is_known = is_as_recorded(path)
    if is_known is not None:
        return is_known
    try:
        written = read_metadata(path)
        return written.get("modelspec.title") in (run.name, run.stem) and is_made_by(written, identity)
    except (K5Error, ValueError, KeyError, TypeError, AttributeError):
        return False
