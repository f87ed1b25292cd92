"""``k5train export``, ``merge`` and ``check-lora``: the commands for LoRA files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from k5cache.shared import console
from k5cache.shared.foreign import shown
from k5cache.shared.loading import begin_to_collect
from k5cache.shared.units import count_of

if TYPE_CHECKING:
    from k5train.adapter.comfyui import Program
    from k5train.adapter.export import Written
    from k5train.adapter.into_base import Merged
    from k5train.adapter.who_loads import Report

LoraPath = Annotated[Path, typer.Argument(help="A LoRA's .safetensors file, from any trainer, or a run's folder.")]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--model", help="A model folder with the architecture. Default: its run's, or Kandinsky 5 Image Lite."
    ),
]
Form = Annotated[
    Literal["diffusers", "kohya"], typer.Option("--format", help="diffusers (ComfyUI loads it too) or kohya.")
]
DType = Literal["fp32", "bf16", "fp16"]
Number = Annotated[DType, typer.Option("--dtype", help="fp32, or bf16 and fp16 for half the size.")]


def export(
    file: LoraPath,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: FILE-kohya or FILE-diffusers.")] = None,
    form: Form = "kohya",
    number: Number = "fp32",
    model: Folder = None,
) -> None:
    """Write a LoRA, a DoRA or a LoKr with the keys of another program, or in 16 bits.

    ComfyUI reads a DoRA's magnitudes only from kohya's keys, and they depend on the base: give --model DIR.
    """
    from k5train.adapter.checks import check_model_folder, check_target
    from k5train.adapter.header import check_kind

    file, _ = lora_in(file)
    target = out or file.with_name(f"{file.stem}-{form}{'' if number == 'fp32' else '-' + number}.safetensors")
    check_target(target)
    check_model_folder(model)
    check_kind(file)
    model = model or _model_of_run(file)
    from k5train.adapter.export import export as export_lora  # torch is imported here, which takes seconds

    begin_to_collect()
    written = export_lora(file, target, form, number, model)
    console.out.print(f"Wrote {target}: {count_of(written.num_modules, 'module')}, {form} keys, {number}", markup=False)
    _say_what_is_missing(written)
    if form == "kohya":
        console.note(
            "This is for ComfyUI and other programs that read kohya's keys. diffusers ignores them without an error"
        )
    console.next_step("Next, see which programs load it", _check_command(target, model))


def merge(
    files: Annotated[
        list[Path], typer.Argument(help="LoRA files or folders of runs: two or more, or one for --into-base.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; the new folder with --into-base.")],
    weights: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Strength of each file, in order. Default: 1 each.")
    ] = None,
    into_base: Annotated[
        str | None,
        typer.Option(
            "--into-base",
            metavar="DIR",
            help="Add them to the weights of this model, a folder or a repository, and write a whole checkpoint.",
        ),
    ] = None,
    form: Annotated[
        Literal["diffusers", "kohya"] | None,
        typer.Option("--format", help="diffusers (ComfyUI loads it too, the default) or kohya."),
    ] = None,
    number: Annotated[
        DType | None,
        typer.Option("--dtype", help="fp32, bf16 or fp16. Default: fp32; with --into-base what the base has."),
    ] = None,
    model: Folder = None,
) -> None:
    """Write one LoRA that does exactly what several do together, or a whole checkpoint that has them in its weights.

    The rank of one LoRA is the sum of theirs; no LoRA does exactly what a DoRA or a LoKr does. A checkpoint
    (--into-base) takes all three kinds.
    """
    from k5train.adapter.checks import check_model_folder, check_target, check_weights
    from k5train.adapter.header import check_kind

    files = [lora_in(file)[0] for file in files]
    weights = weights or [1.0] * len(files)
    check_weights(len(files), weights)
    if into_base is not None:
        _merge_into_base(files, weights, into_base, out, number, {"--format": form, "--model": model})
        return
    check_target(out)
    check_model_folder(model)
    for file in files:
        check_kind(file)
    model = model or next(filter(None, map(_model_of_run, files)), None)
    from k5train.adapter.export import merge as merge_loras  # torch is imported here, which takes seconds

    begin_to_collect()
    written = merge_loras(files, weights, out, form or "diffusers", number or "fp32", model)
    console.out.print(
        f"Wrote {out}: {count_of(written.num_modules, 'module')} from {count_of(len(files), 'file')}", markup=False
    )
    _say_what_is_missing(written)
    console.next_step("Next, see which programs load it", _check_command(out, model))


def _merge_into_base(
    files: list[Path], weights: list[float], base: str, out: Path, number: DType | None, others: dict[str, object]
) -> None:
    from k5cache.shared import interrupt
    from k5cache.shared.checkpoint import model_folder
    from k5cache.shared.errors import ModelError, RunError
    from k5cache.shared.model import FLAVOURS, ModelConfig
    from k5cache.shared.outputs import MERGED, check_folder
    from k5train.adapter.header import check_kind

    if given := [name for name, value in others.items() if value is not None]:
        raise RunError(
            f"{given[0]} is about LoRA files, and --into-base writes a checkpoint",
            f"Leave {given[0]} out, or --into-base",
        )
    check_folder(out, MERGED)
    for file in files:
        check_kind(file)
    try:
        folder = model_folder(ModelConfig(path=FLAVOURS.get(base, base)), ("transformer",))
    except ModelError as error:
        raise ModelError(error.problem, error.fix.replace("--model DIR", "--into-base DIR")) from error
    from k5train.adapter.export import DTYPES  # torch is imported here, which takes seconds
    from k5train.adapter.into_base import merge_into_base

    begin_to_collect()
    again = "Stopped. What is written stays: run the same command again to go on"
    with console.progress() as bars, interrupt.saying(again):
        task = bars.add_task(f"merging into {out.name}", total=None, unit="tensor", note="")
        merged = merge_into_base(
            files, weights, folder, out, DTYPES[number] if number else None,
            lambda done, total: bars.update(task, completed=done, total=total),
        )  # fmt: skip
    print_merged(merged, out, folder)


def print_merged(merged: Merged, out: Path, base: Path) -> None:
    """What a merged checkpoint holds, what was lost by rounding, and how to load it."""
    if merged.was_there:
        console.out.print(f"{out} is this merge already: nothing was written", markup=False)
    else:
        size = console.human_bytes(merged.num_bytes)
        console.out.print(
            f"Wrote {out}: {count_of(merged.num_modules, 'module')} of {base} changed, {size}", markup=False
        )
    for path in merged.other_base:
        console.warn(f"{path} was trained on another base than {base}: the pictures may differ from those of its run")
    if merged.lost:
        console.note(
            f"Rounding to 16 bits loses {merged.lost:.1%} of the change (root mean square). --dtype fp32 keeps it, in"
            " twice the size"
        )
    if merged.left_out:
        console.note(f"{_of_text_encoders(merged.left_out)} left out: the checkpoint's stay as they are")
    where = f'"{out}", torch_dtype=torch.bfloat16'
    if merged.is_pipeline and merged.parts:
        console.note(f"Beside the transformer are the base's own {', '.join(merged.parts)}")
        console.next_step("In diffusers, load it by", f"DiffusionPipeline.from_pretrained({where})")
    else:
        call = f'Kandinsky5Transformer3DModel.from_pretrained({where}, subfolder="transformer")'
        console.next_step("In diffusers, load the transformer by", call)


def check_lora(file: LoraPath, model: Folder = None) -> None:
    """Say which keys of a LoRA file diffusers and ComfyUI would load, and at which strength.

    Exit code 1 unless both load all of them alike; 2 if it is not a LoRA of this model.
    """
    from k5train.adapter.checks import check_model_folder
    from k5train.adapter.header import check_kind

    file, is_compared = lora_in(file)
    check_model_folder(model)
    check_kind(file)
    model = model or _model_of_run(file)
    from k5train.adapter.export import architecture  # torch is imported here, which takes seconds
    from k5train.adapter.who_loads import check_lora as check

    begin_to_collect()
    report = check(file, architecture(model, file))
    print_report(report, model)
    if is_compared:
        console.note("It is the file that its run wrote: the checksum matches")
    if not report.is_good:
        raise typer.Exit(1)


def lora_in(path: Path) -> tuple[Path, bool]:
    """The file that a path means: itself, or the finished LoRA in the folder of a run.

    Returns:
        also whether it was compared with the checksum that its run wrote.

    Raises:
        RunError: the run has no finished LoRA, or the file is not the one that its run wrote.
    """
    from k5cache.shared.errors import RunError
    from k5cache.shared.outputs import kind_of
    from k5train.runs.folder import Run
    from k5train.runs.written import check_recorded

    if kind_of(path) != "run":
        return path, path.is_file() and check_recorded(path)
    run = Run(path if path.name not in ("", "..") else path.resolve())
    if run.lora.is_file():
        return run.lora, check_recorded(run.lora)
    checkpoints = list(run.checkpoints().values())
    resume = f"Finish it: {console.command('k5train', 'resume', path)}"
    raise RunError(
        f"{path} is a run without a finished LoRA",
        f"Give its last checkpoint, {checkpoints[-1]}, or finish it first" if checkpoints else resume,
    )


def _model_of_run(file: Path) -> Path | None:
    """The model folder of the run that a LoRA lies in. None: it lies in no run, or in one of a published model."""
    from k5cache.shared.errors import K5Error
    from k5cache.shared.places import is_model
    from k5train.runs.folder import open_run
    from k5train.runs.written import root_of

    try:
        path = open_run(root_of(file))[1].path
    except K5Error:  # not a run, or a damaged one, whose LoRA can be looked at all the same
        return None
    return Path(path) if path and is_model(path) else None


def _check_command(file: Path, model: Path | None) -> str:
    return console.command("k5train", "check-lora", file, model=model)


def _of_text_encoders(keys: Sequence[str]) -> str:
    return count_of(len(keys), "key of text encoders is", "keys of text encoders are")


def _say_what_is_missing(written: Written) -> None:
    if written.left_out:
        console.note(
            f"{_of_text_encoders(written.left_out)} left out, such as {written.left_out[0]}: "
            "Kandinsky's pipeline loads none"
        )
    if written.num_silent == written.num_modules:
        console.warn("It does nothing: lora_A or lora_B of every module is all zero")


def print_report(report: Report, model: Path | None) -> None:
    """What each program would load, and what to do if one would ignore keys."""
    from k5train.adapter.header import PIPELINE_KEY
    from k5train.adapter.pairs import OtherSize
    from k5train.adapter.who_loads import BY_TRANSFORMER

    facts = [
        report.kind,
        f"{count_of(report.num_keys, 'key')}",
        f"rank {', '.join(map(str, report.ranks)) or 'unknown'}",
        *report.dtypes,
    ]
    console.out.print(Text(f"{report.path}: {', '.join(facts)}"))
    if pipeline := report.metadata.get(PIPELINE_KEY):
        console.out.print(Text(f"It was trained for {shown(pipeline)}: pipe is one"))
    table = Table(box=None, pad_edge=False)
    for column in ("program", "modules", "strength", "keys ignored", "verdict"):
        table.add_column(column, overflow="fold")
    for program in report.programs:
        counts = (str(len(program.modules)), strength_in(program.strengths.values()), str(len(program.unused)))
        table.add_row(program.name, *counts, Text(_verdict(program)))
    console.out.print(table)
    for line in findings(report):
        console.out.print(Text(line))
    if isinstance(report.refusal, OtherSize):
        console.next_step("Name the model that it was trained on", _check_command(report.path, Path("DIR")))
    elif not report.is_good and not report.refusal:
        command = console.command("k5train", "export", report.path, format="diffusers", model=model)
        console.next_step("To write one file that both load alike", command)
    if any(program.name == "diffusers' transformer" and program.loads_all for program in report.programs):
        console.next_step("In diffusers, load it by", BY_TRANSFORMER.replace("FILE", f'"{report.path}"'))


def findings(report: Report) -> list[str]:
    """What is to be known of a file besides who loads it: why it is refused, where it is silent, what differs."""
    from k5train.adapter.header import EXPORTED_KEY

    lines = []
    form = report.metadata.get(EXPORTED_KEY)
    if form == "kohya" and report.kind in ("dora", "lokr"):
        lines.append("k5train export wrote it for ComfyUI. For diffusers, give the file that it was exported from")
    elif report.refusal:
        lines.append(f"{report.refusal.problem}. {report.refusal.fix}")
    if report.lora and (silent := report.lora.silent):
        many = len(silent) == len(report.lora.pairs)
        lines.append(
            f"It changes nothing at {'all' if many else len(silent)} of "
            f"{count_of(len(report.lora.pairs), 'module')}, such as {silent[0]}: a matrix or the strength is zero"
        )
    if different := report.differing:
        strengths = {p.name: [p.strengths[m] for m in different if m in p.strengths] for p in report.programs}
        said = [f"{name} {strength_in(values)}" for name, values in strengths.items() if values]
        if report.lora:
            said.append(f"the file says {strength_in(report.lora.strengths[m] for m in different)}")
        lines.append(f"The strengths differ at {count_of(len(different), 'module')}: {', '.join(said)}")
        lines += why_strengths_differ(report)
    return lines


def why_strengths_differ(report: Report) -> list[str]:
    """What the strength in diffusers comes from, and how much stronger or weaker ComfyUI applies the file."""
    by_name = {program.name: program.strengths for program in report.programs}
    diffusers, comfyui = by_name.get("diffusers", {}), by_name.get("ComfyUI", {})
    ratios = [comfyui[m] / diffusers[m] for m in report.differing if m in comfyui and diffusers.get(m)]
    if "lora_adapter_metadata" not in report.metadata or not ratios:
        return []
    return [
        "diffusers multiplies by the alpha / rank of the file's lora_adapter_metadata,"
        f" {strength_in(diffusers.values())}."
        f" ComfyUI does not read that, so its strength is {strength_in(ratios)} of diffusers'"
    ]


def _verdict(program: Program) -> str:
    if program.error:
        return f"refuses the file: {program.error}"
    if not program.modules:
        return "loads nothing, without an error"
    if program.unused:
        return f"ignores {program.unused[0]} and others like it"
    return "loads all of it"


def strength_in(strengths: Iterable[float]) -> str:
    """One factor, or the lowest and the highest of several: ``x2``, ``x0.5 to x2``."""
    different = sorted({f"{strength:g}": strength for strength in strengths}.items(), key=lambda pair: pair[1])
    if not different:
        return "-"
    lowest, highest = different[0][0], different[-1][0]
    return f"x{lowest}" if lowest == highest else f"x{lowest} to x{highest}"
