"""``k5train export``, ``merge`` and ``check-lora``: the commands for LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from k5cache.shared import console

if TYPE_CHECKING:
    from k5train.adapter.who_loads import Report

LoraPath = Annotated[Path, typer.Argument(help="A LoRA's .safetensors file, from any trainer.")]
Folder = Annotated[
    Path | None, typer.Option("--model", help="A model folder with the architecture. Default: Kandinsky 5 Image Lite.")
]
Form = Annotated[
    Literal["diffusers", "kohya"], typer.Option("--format", help="diffusers (ComfyUI loads it too) or kohya.")
]
Number = Annotated[
    Literal["fp32", "bf16", "fp16"], typer.Option("--dtype", help="fp32, or bf16 and fp16 for half the size.")
]


def export(
    file: LoraPath,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: FILE-kohya or FILE-diffusers.")] = None,
    form: Form = "kohya",
    number: Number = "fp32",
    model: Folder = None,
) -> None:
    """Write a LoRA with the keys of another program, or in 16 bits."""
    from k5train.adapter.export import export as export_lora
    from k5train.runs.written import check_recorded

    check_recorded(file)
    target = out or file.with_name(f"{file.stem}-{form}{'' if number == 'fp32' else '-' + number}.safetensors")
    num_modules = export_lora(file, target, form, number, model)
    console.out.print(f"Wrote {target}: {num_modules} modules, {form} keys, {number}", markup=False)
    if form == "kohya":
        console.note(
            "This is for ComfyUI and other programs that read kohya's keys. diffusers ignores them without an error"
        )
    console.next_step("Next, see which programs load it", console.command("k5train", "check-lora", target, model=model))


def merge(
    files: Annotated[list[Path], typer.Argument(help="Two or more LoRA files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    weights: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Strength of each file, in order. Default: 1 each.")
    ] = None,
    form: Form = "diffusers",
    number: Number = "fp32",
    model: Folder = None,
) -> None:
    """Write one LoRA that does exactly what several do together. Its rank is the sum of theirs."""
    from k5train.adapter.export import merge as merge_loras
    from k5train.runs.written import check_recorded

    for file in files:
        check_recorded(file)

    num_modules = merge_loras(files, weights or [1.0] * len(files), out, form, number, model)
    console.out.print(f"Wrote {out}: {num_modules} modules from {len(files)} files", markup=False)
    console.next_step("Next, see which programs load it", console.command("k5train", "check-lora", out, model=model))


def check_lora(file: LoraPath, model: Folder = None) -> None:
    """Say which keys of a LoRA file diffusers and ComfyUI would load. Exit code 1 unless both load all of them."""
    from k5train.adapter.export import architecture
    from k5train.adapter.who_loads import check_lora as check
    from k5train.runs.written import check_recorded

    is_compared = check_recorded(file)
    report = check(file, architecture(model))
    print_report(report)
    if is_compared:
        console.note("It is the file that its run wrote: the checksum matches")
    if not report.is_good:
        raise typer.Exit(1)


def print_report(report: Report) -> None:
    """What each program would load, and what to do if one would ignore keys."""
    from k5train.adapter.who_loads import BY_TRANSFORMER, OTHER_MODEL

    facts = [
        report.kind,
        f"{report.num_keys} keys",
        f"rank {', '.join(map(str, report.ranks)) or 'unknown'}",
        *report.dtypes,
    ]
    console.out.print(Text(f"{report.path}: {', '.join(facts)}"))
    table = Table(box=None, pad_edge=False)
    for column in ("program", "modules", "keys ignored", "verdict"):
        table.add_column(column)
    for program in report.programs:
        if program.error:
            verdict = f"refuses the file: {program.error}"
        elif not program.modules:
            verdict = "loads nothing, without an error"
        elif program.unused:
            verdict = f"ignores {program.unused[0]} and others like it"
        else:
            verdict = "loads all of it"
        table.add_row(program.name, str(len(program.modules)), str(len(program.unused)), Text(verdict))
    console.out.print(table)
    if any(program.error == OTHER_MODEL for program in report.programs):
        console.next_step(
            "Name the model that it was trained on", console.command("k5train", "check-lora", report.path, model="DIR")
        )
    elif report.kind == "lora" and not report.is_good:
        console.next_step("To fix it", console.command("k5train", "export", report.path, format="diffusers"))
    elif any(program.name == "diffusers' transformer" and program.loads_all for program in report.programs):
        console.next_step("In diffusers, load it by", BY_TRANSFORMER.replace("FILE", f'"{report.path}"'))
