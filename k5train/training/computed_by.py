"""What computes the steps of a run? Another GPU, torch or kernel rounds differently, and a deterministic run must not.

A kernel of ours is compared with plain arithmetic at every start and is not used where that fails, which can have a
passing reason: a full disk, or a compiler that was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.forward import checks
from k5train.runs.differences import differences
from k5train.runs.resume_state import SavedState

if TYPE_CHECKING:
    from k5train.forward.execute import Execution

KEY = "computed_by"
"""The field of a state that has it."""


def computed_by(device: torch.device, execution: Execution | None) -> dict[str, Any]:
    """What decides the last bits of a step beside its recipe and its plan, as JSON.

    Args:
        execution: None: blocks run as diffusers' own modules.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernels = {**execution.modes._asdict(), **checks.outcomes()} if execution else {}
    return {"device": name, "torch": str(torch.__version__), "kernels": kernels}


def check_computed_by(saved: SavedState, now: Mapping[str, Any]) -> None:
    """Refuse to go on with a deterministic run that would end with other bits.

    A state of an earlier version says nothing of it. Kernels that only one of the two has compared are not looked at.

    Raises:
        RunError: what computes is not what did; names each difference.
    """
    before = saved.facts.get(KEY)
    if not isinstance(before, dict) or not isinstance(before.get("kernels"), dict):
        return
    both = sorted(before["kernels"].keys() & now["kernels"].keys())
    was, is_now = ({**facts, "kernels": {name: facts["kernels"][name] for name in both}} for facts in (before, now))
    different = differences(was, is_now)
    if different:
        run = saved.folder.parent.parent
        inexactly = console.command("k5train", "resume", run, set="train.deterministic=false")
        raise RunError(
            f"{run} is deterministic, and what computes here has other last bits: {'; '.join(different)}",
            f"Resume it with what it was begun with, or go on with other rounding: {inexactly}",
        )
