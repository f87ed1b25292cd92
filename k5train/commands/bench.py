"""``k5train bench``: what will this card do?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5cache.shared.drawn import check_replaceable
from k5cache.shared.errors import RunError
from k5cache.shared.loading import begin_to_collect
from k5cache.shared.outputs import check_file

if TYPE_CHECKING:
    import torch
    from rich.table import Table

MARK = b'"milliseconds": '
"""In each of the first lines of the JSON that this command writes."""


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what this card itself would do, without the table of sizes.")
    ] = False,
    i2i: Annotated[
        bool, typer.Option("--i2i", help="Time image-to-image beside text-to-image, both with 500 text tokens.")
    ] = False,
    baseline: Annotated[
        bool, typer.Option(help="Also time diffusers + peft + quanto, eager and compiled: needs 20 GB of VRAM.")
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also list each step's kernels: by what they are for, and the longest.")
    ] = False,
    graph: Annotated[
        bool, typer.Option("--graph/--no-graph", help="Capture steps as CUDA graphs, as runs do where it works.")
    ] = True,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a case.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the numbers here, as JSON.")] = None,
) -> None:
    """Time training steps of a full-size transformer with random weights on this card. Downloads nothing."""
    if out is not None:
        check_replaceable(check_file(out), out, lambda begins: MARK in begins, "was not written by k5train bench")
    device = gpu_to_measure(out)
    import torch

    from k5train.bench import timing
    from k5train.bench.case import EDITS, MUST_REACH, QUICK, SIZES
    from k5train.bench.steps import (
        COLUMNS,
        KERNEL_COLUMNS,
        as_json,
        beside_t2i,
        kernel_rows,
        limits,
        table_rows,
        time_cases,
        within,
    )
    from k5train.planning import vram

    wanted = EDITS if i2i else (*MUST_REACH, *SIZES)
    cases = within(vram.budget(device, None), wanted)
    if quick:
        cases = tuple(dict.fromkeys(replace(case, cap_gib=None) for case in EDITS)) if i2i else QUICK
    if not graph:
        cases = tuple(replace(case, graph="off") for case in cases)
    with console.working("timing steps"):
        ceiling = timing.matmul_ceiling(device)
        results = time_cases(
            cases, device, baseline=(EDITS[1] if i2i else MUST_REACH[0]) if baseline else None, num_steps=steps
        )
    title = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {ceiling:.0f} TFLOP/s bf16 matmul"
    console.out.print(_table(title, COLUMNS, table_rows(results, ceiling), numbers=COLUMNS[1:5]))
    for line in (*limits(results), *beside_t2i(results)):
        console.out.print(line, markup=False)
    for result in results if profile else ():
        kernels = kernel_rows(result)
        console.out.print(_table(result.name, KERNEL_COLUMNS, kernels, KERNEL_COLUMNS[1:3], len(result.groups or ())))
    if out is not None:
        out.write_text(as_json(results), encoding="utf-8")


def _table(
    title: str, columns: tuple[str, ...], rows: list[list[str]], numbers: tuple[str, ...], first_part: int = 0
) -> Table:
    """Rows under their columns, without those in which nothing stands; a free line after the first part."""
    told = [number for number, texts in enumerate(zip(*rows, strict=True)) if any(texts)]
    table = console.table(title, *(columns[number] for number in told), numbers=numbers)
    for count, row in enumerate(rows, 1):
        table.add_row(*(row[number] for number in told))
        if count == first_part:
            table.add_row()
    return table


def gpu_to_measure(out: Path | None) -> torch.device:
    """The GPU, once it is clear that there is one and that the numbers can be written to ``out``.

    Raises:
        RunError: torch sees no GPU, or ``out`` lies in a folder that does not exist.
        OutputError: ``out`` cannot be written.
    """
    if out is not None and not out.parent.is_dir():
        raise RunError(f"There is no folder {out.parent} to write the numbers to", f"Run: mkdir -p {out.parent}")
    if out is not None:
        check_file(out)
    import torch  # only now, as it takes seconds

    if not torch.cuda.is_available():
        raise RunError(f"torch {torch.__version__} sees no GPU", "Run this on the machine where you mean to train")
    begin_to_collect()
    return torch.device("cuda")
