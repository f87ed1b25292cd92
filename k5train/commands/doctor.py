"""``k5train doctor``: would training work on this machine, and what is to be mended?"""

from __future__ import annotations

import textwrap
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer
from rich.text import Text

from k5cache.shared import console
from k5cache.shared.foreign import shown
from k5cache.shared.model import ModelConfig
from k5train.commands.arguments import Model, check_vram
from k5train.doctor.check import Check

_STYLES = {"good": "green", "look at this": "yellow", "does not work": "bold red"}
_MARK, _NAME = 14, 11
_LEAST_WIDTH, _MOST_WIDTH = 30, 120


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    vram: Annotated[str | None, typer.Option(help='Plan for a card of this size: "12GB".')] = None,
    model: Model = None,
) -> None:
    """Check this machine: GPU, driver, torch, compiler, disk, RAM, hub and packages, and say what to mend.

    Exits with 0 if training would work, and with 1 if something does not work.
    """
    if vram is not None:
        check_vram(vram)
    if not as_json:
        console.out.print("Checking this machine", style="bold")
    from k5train.doctor.examine import steps

    checks = []
    for step in steps(vram, ModelConfig(path=model)):
        with _activity(step.activity()):
            check = step.make()
        checks.append(check)
        if not as_json:
            _show(check)
    bad = [check.name for check in checks if check.mark == "does not work"]
    if as_json:
        console.print_json({"works": not bad, "checks": checks})
    elif bad:
        console.out.print(Text.assemble(("Training would not work here: ", "bold red"), f"see {', '.join(bad)}"))
    else:
        console.next_step("Training would work here. Next, encode your images", "k5cache encode datasets/my_images")
    raise typer.Exit(1 if bad else 0)


def _activity(activity: str) -> AbstractContextManager[object]:
    """Say what takes long: in a spinner, or in a line where there is no terminal."""
    if not activity:
        return nullcontext()
    if console.err.is_terminal:
        return console.err.status(Text(f"{activity} ..."))
    console.note(f"{activity} ...")
    return nullcontext()


def _show(check: Check) -> None:
    """The mark and the name in columns, the rest wrapped beside them; commands stay whole, to be copied."""
    indent = " " * (_MARK + _NAME)
    width = max(_LEAST_WIDTH, min(console.out.width, _MOST_WIDTH) - len(indent))
    found, *rest = textwrap.wrap(shown(check.found), width, break_on_hyphens=False) or [""]
    head = Text.assemble((f"{check.mark:<{_MARK}}", _STYLES[check.mark]), (f"{check.name:<{_NAME}}", "bold"), found)
    console.out.print(head)
    for line in rest:
        console.out.print(indent + line)
    for line in textwrap.wrap(shown(check.meaning), width, break_on_hyphens=False):
        console.out.print(indent + line, style="dim")
    for command in check.commands:
        console.out.print(Text.assemble(indent, (command, "cyan")))
