"""Has torchrun started several processes of a command that is for one? They would do the same work, into one folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from k5cache.shared.command_line import this_command_alone
from k5cache.shared.errors import K5Error


def refuse_torchrun(
    program: str, command: str | None, shared: Collection[str], on_gpus: Collection[str],
    env: Mapping[str, str] = os.environ,
) -> None:  # fmt: skip
    """Refuse a command that is not for several processes. Only the first one says why.

    Args:
        program: ``k5train`` or ``k5cache``.
        command: the command that was typed.
        shared: the commands that are for several processes.
        on_gpus: those that take ``--gpus`` instead.

    Raises:
        K5Error: it is one of several.
        SystemExit: so is this, and another process has said it.
    """
    rank, size = env.get("RANK", ""), env.get("WORLD_SIZE", "")
    is_torchrun = "LOCAL_RANK" in env and rank.isdecimal() and size.isdecimal()  # RANK alone is of a cluster's pods
    if command is None or command in shared or not is_torchrun or int(size) < 2:
        return
    if int(rank):
        raise SystemExit(2)
    instead = {"gpus": env.get("LOCAL_WORLD_SIZE", size)} if command in on_gpus else {}
    raise K5Error(
        f"{program} {command} is one process, and torchrun has started {size} of it",
        f"Run it without torchrun: {this_command_alone(**instead)}",
    )
