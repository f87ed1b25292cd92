"""Is the time that `k5train plan` predicts the time that steps take? Each case is probed, then measured at full size.

python -m pipelines.measure.step_time -o step_time.json
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from k5cache.shared import console
from k5cache.shared.vram import limit
from k5train.base.architecture import FULL_SIZE
from k5train.bench.case import Case
from k5train.bench.probe import probe
from k5train.bench.steps import measure_or_warn, time_recipe
from k5train.commands.bench import gpu_to_measure
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.planning.plan import plan_for
from k5train.planning.time import Size
from pipelines.measure import command_line

CASES = tuple(Case("int8-dynamic", cap, side, rank=16) for cap in (16, 8.5) for side in (1024, 512))


def compare(case: Case, device: torch.device, config: dict[str, Any] = FULL_SIZE) -> dict[str, Any]:
    """The predicted and the measured step of a case, in seconds."""
    assert case.cap_gib is not None
    train = TrainConfig(
        batch_size=case.batch_size, base_model_precision=case.precision, mixed_precision="bf16",
        lora=LoraConfig(rank=case.rank, alpha=case.rank, targets=case.targets),
    )  # fmt: skip
    sizes = ((case.side // 16) ** 2, case.num_text_tokens)
    plan = plan_for(config, train, device, sizes, int(case.cap_gib * 2**30))
    began = time.monotonic()
    step = probe(config, train, plan, [Size(*sizes, 1.0)], device)
    took = time.monotonic() - began
    if device.type == "cuda":
        torch.cuda.empty_cache()
        limit(device, None)
    measured = measure_or_warn(case.name, lambda: time_recipe(train, case, device, config, 8, 2))
    seconds = measured.milliseconds / 1000 if measured else None
    return {
        "case": case.name, "predicted": asdict(step), "measured": seconds,
        "error": step.seconds / seconds - 1 if seconds else None, "seconds_of_probe": took,
        "levels": {level: plan.levels.count(level) for level in dict.fromkeys(plan.levels)},
        "streamed": plan.streaming.num_blocks if plan.streaming else 0,
    }  # fmt: skip


def main(out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the numbers, as JSON.")]) -> None:
    """Compare predicted with measured steps: two caps of memory, two sizes."""
    device = gpu_to_measure(out)
    rows = []
    for case in CASES:
        rows.append(compare(case, device))
        console.out.print(json.dumps(rows[-1]), markup=False)
        command_line.write_json(out, {"card": torch.cuda.get_device_name(), "cases": rows})


if __name__ == "__main__":
    command_line.run(main)
