"""``k5train bench``: what will this card do?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import RunError

if TYPE_CHECKING:
    import torch


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only this card's own plan, no table of caps and sizes.")
    ] = False,
    baseline: Annotated[bool, typer.Option(help="Also time diffusers + peft + quanto: needs 20 GB of VRAM.")] = True,
    gradients: Annotated[
        bool,
        typer.Option(help="Also what int8 costs: LoRA gradients by kind of layer, the velocity part by part."),
    ] = False,
    features: Annotated[
        bool, typer.Option("--features", help="Time TREAD, rollout, the loader and a sweep's second start instead.")
    ] = False,
    start: Annotated[
        bool, typer.Option("--start", help="Time a run's start, first and second, and its host memory, instead.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a case.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the numbers here, as JSON.")] = None,
) -> None:
    """Time training steps of a full-size transformer with random weights on this card. Downloads nothing."""
    import torch

    from k5train.base import architecture, random_weights
    from k5train.bench import case, timing
    from k5train.bench import steps as benching
    from k5train.exact import int8_error
    from k5train.planning import vram

    if not torch.cuda.is_available():
        raise RunError(f"There is no GPU that torch {torch.__version__} sees", "Run it where you mean to train")
    device = torch.device("cuda")
    if features and start:
        raise RunError("--features and --start each measure instead of the rest", "Give one of them at a time")
    if out is not None and not out.parent.is_dir():
        raise RunError(f"There is no folder {out.parent}", "Make it first: what is measured is to be written there")
    if features:
        time_features(device, max(steps, 20), out)
        return
    if start:
        time_start(device, out)
        return
    cases = tuple(case.Case(p, None) for p in ("int8-quanto", "int8-dynamic"))
    cases = cases if quick else benching.within(vram.budget(device, None), (*case.MUST_REACH, *case.SIZES))
    ceiling = timing.matmul_ceiling(device)
    results = benching.bench(cases, device, baseline=baseline, num_steps=steps)
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {ceiling:.0f} TFLOP/s bf16 matmul"
    table = console.table(title, *benching.COLUMNS, numbers=benching.COLUMNS[1:5])
    for row in benching.table(results, ceiling):
        table.add_row(*row)
    console.out.print(table)
    if gradients:
        console.out.print(int8_error.compare_gradients(architecture.FULL_SIZE, device))
        whole = random_weights.random_transformer(architecture.FULL_SIZE, "no_change", device)
        inputs = [case.inputs_for(cases[0], architecture.FULL_SIZE, device)]
        console.out.print(int8_error.parts_table(int8_error.error_by_part(whole, inputs)))
    if out is not None:
        out.write_text(benching.as_json(results), encoding="utf-8")


def time_start(device: torch.device, out: Path | None) -> None:
    """``bench --start``."""
    import json
    from dataclasses import asdict

    import torch

    from k5train.bench import start as starting

    found = starting.bench_start()
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, full size, random weights"
    table = console.table(title, *starting.COLUMNS, numbers=starting.COLUMNS[1:])
    for row in starting.table(found):
        table.add_row(*row)
    console.out.print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(s) for s in found], indent=2) + "\n", encoding="utf-8")


def time_features(device: torch.device, num_steps: int, out: Path | None) -> None:
    """``bench --features``."""
    import torch

    from k5train.bench import features

    found = features.bench_features(device, num_steps=num_steps)
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, defaults, 1024 px, random weights"
    table = console.table(title, *features.COLUMNS, numbers=features.COLUMNS[1:5])
    for row in features.table(found):
        table.add_row(*row)
    console.out.print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(f) for f in found], indent=2) + "\n", encoding="utf-8")
