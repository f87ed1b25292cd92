"""What does a line of metrics.jsonl say of an update, besides its loss? Fields by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from k5train.objective.rollout import Cost
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import Ranks

MOST_ROWS = 64  # row numbers in a line of metrics.jsonl


def tail_mean(losses: Sequence[float], count: int = 20) -> float:
    """The mean of the last losses, which a progress bar shows."""
    return sum(losses[-count:]) / len(losses[-count:])


def rows_of(rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Which rows an update trained on. A long list is left out: the file would be as large as the LoRA."""
    named = {"rows": list(rows)} if len(rows) <= MOST_ROWS else {}
    return {"num_rows": len(rows), **named, "images_per_second": float(f"{len(rows) / seconds:.4g}")}


def prodigy_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The factor that Prodigy has found for the learning rate."""
    return {"prodigy_d": float(group["d"])} if "d" in (group := optimizer.param_groups[0]) else {}


def cost_of_rollouts(cost: Cost, config: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """What rollouts cost in this update: the passes of all processes, and the seconds of the slowest one."""
    own = cost.take()
    if ranks.size == 1 or not config.rollout.probability:
        return own
    costs = [cost for cost in ranks.gather(own) if cost]
    passes, seconds = ([cost[name] for cost in costs] for name in ("rollout_passes", "rollout_seconds"))
    return {"rollout_passes": sum(passes), "rollout_seconds": max(seconds)} if costs else {}


def memory_of(device: torch.device, planned_bytes: int) -> dict[str, Any]:
    """What the update took, and beside it what the plan predicted."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    peaks = {"peak_reserved_gib": "reserved_bytes.all.peak", "peak_allocated_gib": "allocated_bytes.all.peak"}
    return {**{name: stats[key] / 2**30 for name, key in peaks.items()}, "planned_gib": planned_bytes / 2**30}


def steps_of(config: TrainConfig) -> dict[str, Any]:
    """How many updates the epochs of a recipe came to, which its files do not say otherwise."""
    return {} if config.epochs is None else {"steps": config.steps}
