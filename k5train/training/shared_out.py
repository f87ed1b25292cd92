"""How is a run shared out among several processes, and do they see the same? Numbers and names, no torch."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5cache.shared.host_memory import free_ram
from k5cache.shared.recipe import to_dict
from k5cache.shared.units import count_of
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import Ranks
from k5train.planning.host_memory import check_host_memory
from k5train.runs.differences import differences
from k5train.runs.resume_state import inexactly

if TYPE_CHECKING:
    from k5train.runs.folder import Run
    from k5train.runs.resume_state import SavedState

RANKS = "ranks"
"""In a saved state: the processes that trained it. It is not there if one did, always."""
_PACKAGES = ("kandinsky5-lora", "torch", "diffusers", "peft")


def as_one(config: TrainConfig, num_ranks: int) -> TrainConfig:
    """The recipe with which one GPU does the same updates."""
    return replace(config, gradient_accumulation_steps=config.gradient_accumulation_steps * num_ranks)


def facts_of(ranks: Ranks, saved: SavedState | None) -> dict[str, Any]:
    """What a saved state says of the processes."""
    is_shared = ranks.size > 1 or (saved is not None and RANKS in saved.facts)
    return {RANKS: ranks.size} if is_shared else {}


def shared_out(config: TrainConfig, run: Run, saved: SavedState | None, num_ranks: int) -> TrainConfig:
    """The recipe of a run for this number of processes: an update has the micro-batches that it had before.

    Raises:
        RunError: they cannot be shared evenly; or the run is deterministic, and the sums of another number of processes
            are rounded differently.
    """
    if saved is None or (num_ranks == 1 and RANKS not in saved.facts):
        return config
    before = int(saved.facts.get(RANKS, 1))
    if config.deterministic and before != num_ranks:
        raise RunError(
            f"{run.root} is deterministic and was trained on {count_of(before, 'GPU')}: gradients that"
            f" {num_ranks} add up are rounded differently",
            f"Resume with --gpus {before}, or without the same bits: {inexactly(run.root)}",
        )
    of_update = int(saved.facts["identity"]["train"]["gradient_accumulation_steps"])
    if of_update % num_ranks:
        fitting = [str(n) for n in range(1, min(of_update, 64) + 1) if of_update % n == 0]
        raise RunError(
            f"An update of {run.root} has {count_of(of_update, 'micro-batch', 'micro-batches')}, which {num_ranks} GPUs"
            " cannot share evenly",
            f"Use --gpus with one of {', '.join(fitting)}, or start another run with --new",
        )
    own = of_update // num_ranks
    if before != num_ranks:
        console.note(
            f"The run was on {count_of(before, 'GPU')} and is on {num_ranks} now: each does"
            f" {count_of(own, 'micro-batch', 'micro-batches')} of the {of_update} of an update"
        )
    return replace(config, gradient_accumulation_steps=own)


def seen(run_identity: dict[str, Any], saved: SavedState | None) -> dict[str, Any]:
    """What every process must see the same: caches, weights, recipe and the saved state."""
    files = (saved.files or {}) if saved else {}
    return {**run_identity, "state": {name: digest.sha256 for name, digest in files.items()}}


def check_alike(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Refuse to train together if the processes do not see the same.

    Args:
        facts: what must be the same, as JSON.

    Raises:
        RunError: names the rank and what differs.
    """
    first, *others = ranks.gather({**facts, "version": {name: version(name) for name in _PACKAGES}})
    for rank, other in enumerate(others, 1):
        if lines := differences(first, other):
            raise RunError(
                f"Rank {rank} does not see what rank 0 sees: {'; '.join(_worded(lines))}",
                "Give every process the same command, the same versions and the same files, and start them again",
            )


def check_room(ranks: Ranks, num_bytes: int) -> None:
    """Refuse to load if the processes of this machine together stream more weights from host memory than is free.

    Args:
        num_bytes: what each process streams.

    Raises:
        DoesNotFit: says for how many there is room.
    """
    host = socket.gethostname()
    num_here = ranks.gather(host).count(host)
    if num_here > 1:
        check_host_memory([num_bytes] * num_here, free_ram())
    ranks.gather("room")  # nobody loads before all have looked


def _worded(lines: Sequence[str]) -> list[str]:
    """Lines of ``differences``, in which ``now`` is the other rank."""
    worded = []
    for line in lines:
        field = line.partition(": ")[0]
        is_rows = field.endswith(".rows")
        worded.append(f"{field}: other images or captions" if is_rows else line.replace(", now ", ", there "))
    return worded


def order_of(run: Run, folder: Path, config: TrainConfig, caches: Sequence[Path], step: int | None) -> dict[str, Any]:
    """What the first process tells the others to train, as JSON.

    Args:
        step: of the state to go on from.
    """
    return {
        "run": str(run.root.resolve()),
        "folder": str(folder.resolve()),
        "train": to_dict(config),
        "caches": [str(cache.resolve()) for cache in caches],
        "step": step,
    }


def entries_of(config: TrainConfig, caches: Sequence[str]) -> list[DataConfig]:
    """The caches of an order, used as the recipe says."""
    alone = DataConfig(cache="", repeats=config.repeats, repeats_by_folder=config.repeats_by_folder)
    return [replace(entry, cache=path) for entry, path in zip(config.data or (alone,), caches, strict=True)]
