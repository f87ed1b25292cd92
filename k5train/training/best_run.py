"""Which run of a sweep is the best? None, if the losses of its runs do not measure the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k5cache.shared.recipe import to_dict
from k5train.runs.differences import differences
from k5train.training.sweep_runs import SweepRun

if TYPE_CHECKING:
    from k5train.training.sweep import Outcome

# Options of [train], with all below them, that decide what the training loss measures: on which rows, captions and
# sigmas, with which weights, through which blocks.
DECIDE_THE_LOSS = (
    "objective", "tread", "rollout", "flow_schedule_shift", "caption_dropout_probability", "caption_choice", "repeats",
    "seed", "lora.dropout", "validation.split",
)  # fmt: skip
# The held-out loss has fixed rows, sigmas and noise, and no weights, masks, routes or dropout: only these change it.
DECIDE_THE_HELD_OUT_LOSS = ("validation.split", "validation.held_out_sigmas")


@dataclass(frozen=True)
class Best:
    """The best run, or why there is none."""

    label: str | None
    by: str = ""
    """The loss that was compared."""
    reason: str = ""
    """Why no run can be called the best; empty if one can."""


def best_run(runs: Sequence[SweepRun], outcomes: Sequence[Outcome]) -> Best:
    """Compare the finished runs: by their held-out losses if all have one, else by their training losses."""
    finished = [outcome for outcome in outcomes if not outcome.problem]
    changed = _changed([run for run in runs if run.label in {outcome.label for outcome in finished}])
    held_out = [(outcome.best_loss, outcome.label) for outcome in finished if outcome.best_loss is not None]
    if len(held_out) == len(finished) and not _of(changed, DECIDE_THE_HELD_OUT_LOSS):
        return Best(min(held_out)[1], "held-out loss")
    deciding = _of(changed, DECIDE_THE_LOSS)
    if deciding:
        names = " and ".join(f"train.{name}" for name in deciding)
        same = " for all runs" if "validation.split" in deciding else ""
        return Best(
            None,
            reason=f"The losses of these runs cannot be compared: {names} changes what they measure. To compare them "
            f"by a held-out loss, sweep with --set train.validation.split=0.1{same}",
        )
    return Best(min((outcome.last_loss or float("inf"), outcome.label) for outcome in finished)[1], "loss")


def _changed(runs: Sequence[SweepRun]) -> list[str]:
    """The options of [train] that differ between runs."""
    first, *others = (to_dict(run.config) for run in runs)
    lines = [line for other in others for line in differences(first, other)]
    return list(dict.fromkeys(line.partition(":")[0] for line in lines))


def _of(changed: Sequence[str], options: Sequence[str]) -> list[str]:
    return [name for name in changed if any(f"{name}.".startswith(f"{option}.") for option in options)]
