"""What does another process than the first do in a run of several? What it is told to, and it writes nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from k5cache.shared.recipe import parse
from k5train.data.compatible import check_widths
from k5train.data.mixture import open_mixture
from k5train.data.split import split_off
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import Ranks
from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state
from k5train.training.identity import identity
from k5train.training.shared_out import as_one, check_alike, entries_of, seen


def follow(ranks: Ranks) -> None:
    """Train with the first process, which chooses the run, checks it and writes it.

    Raises:
        RunError, RankLost: as ``train``; or this process sees other files than the first one.
    """
    called = time.monotonic()
    order: dict[str, Any] = ranks.agree({})
    (config,) = parse({"train": order["train"]}, {"train": TrainConfig})
    run, folder = Run(Path(order["run"])), Path(order["folder"])
    data = split_off(open_mixture(entries_of(config, order["caches"])), config.validation.split)
    saved = None if order["step"] is None else latest_state(run.state, order["step"])
    run_identity = identity(data, folder, as_one(config, ranks.size))
    check_alike(ranks, seen(run_identity, saved))
    if saved:
        saved.check()
    check_widths(data.first, folder)
    from k5train.training.carry_out import carry_out

    carry_out(data, folder, config, run, run_identity, saved, called, None, None, False, ranks)
