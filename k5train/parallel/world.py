"""Is this process one of several that train together, and which GPU is its own? torchrun's variables say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from k5cache.shared.errors import RunError
from k5cache.shared.gpus import variable_of, visible_gpus
from k5cache.shared.units import count_of

LAUNCHED = "K5_LAUNCHED"
"""Set for the processes that ``launch.py`` starts."""
HURRY = b"hurry\n"
"""What ``launch.py`` writes to their stdin at a second Ctrl-C."""
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class World:
    """A process among several."""

    rank: int
    size: int
    local_rank: int
    """Among those of this machine, which is the number of its GPU."""
    local_size: int
    is_launched: bool = False
    """By ``--gpus``, and not by torchrun."""
    is_told: bool = False
    """Another process passes its signals on to this one: torchrun, or that of ``--gpus``."""


def world_of(env: Mapping[str, str] = os.environ) -> World | None:
    """Which process this is. None: it trains alone.

    Raises:
        RunError: the variables are no numbers.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    try:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", rank))
        world = World(rank, size, local_rank, int(env.get("LOCAL_WORLD_SIZE", size)), LAUNCHED in env,
                      LAUNCHED in env or _OF_TORCHRUN in env)  # fmt: skip
        if not 0 <= rank < max(size, 1):
            raise ValueError(rank)
    except ValueError:
        raise RunError(
            f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, as torchrun sets them, and are no numbers"
            " of a process and of all",
            "Unset both, or start the run by torchrun",
        ) from None
    return world if size > 1 else None


def gpu_of(world: World, device: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable with which this process sees only its own GPU. It must be set before torch is imported.

    Args:
        device: ``train.device``.

    Returns:
        nothing for a run on the CPU.

    Raises:
        RunError: there are fewer GPUs than processes, or ``device`` is one GPU.
    """
    if device.startswith("cuda:"):
        raise RunError(
            f"train.device={device} is one GPU, and {world.size} processes train on one each",
            f"Leave train.device out; {variable_of(env)} says which GPUs are used",
        )
    gpus = visible_gpus(env) if device != "cpu" else ()
    if not gpus:
        return {}
    if world.local_rank >= len(gpus):
        raise RunError(
            f"{world.local_size} processes were started on this machine, and it has {count_of(len(gpus), 'GPU')}",
            f"Use torchrun --nproc-per-node {len(gpus)}",
        )
    return {variable_of(env): gpus[world.local_rank]}
