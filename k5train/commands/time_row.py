"""What a plan's table says of the time of a step on the GPU that is here."""

from __future__ import annotations

from k5cache.shared import console
from k5train.planning.without_loading import Timed


def time_of(timed: Timed | None) -> str:
    """What a step takes and how sure that is; or why that is not known."""
    if timed is None:
        return "not known: there is no GPU here to time it on"
    import torch

    from k5train.bench.probe import estimate

    with console.working("timing a few blocks with random weights"):
        step = estimate(*timed, torch.device("cuda"))
    return step.describe(timed.config) if step else "not known: the blocks could not be timed on this GPU"
