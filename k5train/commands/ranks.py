"""How does a command become several processes that train together? By ``--gpus``, or by torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.parallel.ranks import ALONE, Ranks
from k5train.parallel.world import world_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def start_others(gpus: int | None, *chosen: Path) -> None:
    """With ``--gpus``, run this command line in a process on each GPU, and end with their exit code.

    In one of these processes, and without the option, this does nothing.

    Args:
        chosen: arguments that were not given: the only cache, or the one that a person has chosen.

    Raises:
        K5Error: there are fewer GPUs; or torchrun starts processes already.
    """
    if gpus is None:
        return
    world = world_of()
    if world and not world.is_launched:
        raise RunError(
            f"--gpus {gpus} is given, and torchrun has started {world.size} processes already",
            "Leave --gpus out: each of torchrun's processes trains on one GPU",
        )
    if world:
        return
    from k5cache.shared.gpus import choose_gpus

    choose_gpus(gpus)
    if gpus > 1:
        from k5train.parallel.launch import launch, this_program

        code = launch(this_program(*map(str, chosen)), gpus)
        console.err.quiet = code == console.STOPPED  # the first process has said it
        raise typer.Exit(code)


@contextmanager
def all_ranks(device: str, given: dict[str, Any]) -> Iterator[Ranks]:
    """The processes of this command, which have found each other and were given the same.

    Args:
        device: ``train.device``.
        given: what the command line and its recipe say.

    Raises:
        RunError: one did not come, or was given something else.
    """
    world = world_of()
    if world is None:
        yield ALONE
        return
    from k5train.parallel.together import joined

    together: AbstractContextManager[Ranks] = joined(world, device)
    with together as ranks:
        from k5train.training.shared_out import check_alike

        check_alike(ranks, given)
        yield ranks


def follow(ranks: Ranks) -> None:
    """Be another process than the first."""
    from k5train.training.follow import follow as train_with

    train_with(ranks)
