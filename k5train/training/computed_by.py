"""What computes the steps of a run? Another GPU, torch or kernel rounds differently, and a deterministic run must not.

A kernel of ours is compared with plain arithmetic at every start and is not used where that fails, and blocks run
eagerly where they cannot be compiled. Both can have a passing reason: a full disk, or a compiler that was killed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from k5cache.shared.errors import RunError
from k5train.forward import checks, choices
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import Ranks
from k5train.runs.differences import differences
from k5train.runs.resume_state import SavedState, inexactly

if TYPE_CHECKING:
    from k5train.forward.execute import Execution

KEY, OTHERS = "computed_by", "computed_by_others"
"""The fields of a state that have it: of the first process, and a list of the others if there are any."""
_OF_THE_FIRST_PASS = {"compiled", "row_steps"}


def computed_by(device: torch.device, execution: Execution | None) -> dict[str, Any]:
    """What decides the last bits of a step beside its recipe and its plan, as JSON.

    Args:
        execution: None: blocks run as diffusers' own modules.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernels: dict[str, bool] = {}
    if execution:
        is_compiled = execution.is_compiled
        of_the_first_pass = {"compiled": is_compiled, "row_steps": is_compiled and choices.are_ours()}
        kernels = {**execution.modes._asdict(), **of_the_first_pass, **checks.outcomes()}
    return {"device": name, "torch": str(torch.__version__), "kernels": kernels}


def check_computed_by(
    saved: SavedState | None, own: Mapping[str, Any], config: TrainConfig, ranks: Ranks, *, is_tried: bool
) -> dict[str, Any]:
    """Refuse to go on with a deterministic run that would end with other bits. All processes call this together.

    A state of an earlier version says nothing of it. Kernels that only one of the two has compared are not looked at.

    Args:
        saved: where the run goes on. None: it begins.
        own: ``computed_by`` of this process.
        is_tried: the first pass is done, in which blocks are compiled.

    Returns:
        what a state says of the other processes.

    Raises:
        RunError: what computes is not what did; names each difference. Only the first process raises it.
    """
    first, *others = ranks.gather(dict(own))
    if saved and ranks.is_first and config.deterministic and saved.progress.step < config.steps:
        before, ignored = saved.facts.get(OTHERS), () if is_tried else _OF_THE_FIRST_PASS
        was = [saved.facts.get(KEY), *(before if isinstance(before, list) else ())]
        lines = [
            f"rank {rank}: {line}" if rank else line
            for rank, pair in enumerate(zip(was, [first, *others], strict=False))
            for line in _different(*pair, ignored)
        ]
        if lines:
            run = saved.folder.parent.parent
            raise RunError(
                f"{run} is deterministic, and its last bits would change here: {'; '.join(lines)}",
                f"Resume it where this is as it was, or without the same bits: {inexactly(run, ranks.gpus)}",
            )
    return {OTHERS: others} if others else {}


def _different(was: object, now: Mapping[str, Any], ignored: Collection[str]) -> list[str]:
    """A line for each field and kernel that both have and that differs."""
    if not isinstance(was, dict):
        return []
    kernels = was.get("kernels")
    both = kernels.keys() & now["kernels"].keys() if isinstance(kernels, dict) else set()
    return [
        *(line for name in ("device", "torch") if name in was for line in differences(was[name], now[name], (), name)),
        *(
            line
            for name in sorted(both - set(ignored))
            for line in differences(was["kernels"][name], now["kernels"][name], (), f"kernels.{name}")
        ),
    ]
