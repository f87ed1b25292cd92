"""How does help look? Commands in groups, each with its whole first sentence, and examples that can be copied."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

Words = Annotated[
    list[str] | None, typer.Argument(help="Parts of options' names, such as rank or memory. Default: all options.")
]
"""Which options to list."""
MOST_EXAMPLE = 76
"""Characters of an example: with its indent it fits in 80 columns, so that no terminal breaks it."""
_PACKAGES = ("torch", "transformers", "diffusers", "peft")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class Grouped(TyperGroup):
    """A group of commands whose help lists them by what they are for, in the order in which they were registered."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first: they are what a reader looks for."""
        self.format_commands(ctx, formatter)
        options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(options)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A section for each group. Nothing is cut: a sentence that is too long goes on in the next line."""
        width = max(map(len, self.commands), default=0)
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.commands[name]
            if not command.hidden:
                row = f"{name:<{width}}", first_sentence(command.help or "")
                sections.setdefault(command.rich_help_panel or "Commands", []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, in one line."""
    return _END_OF_SENTENCE.split(" ".join(text.split()))[0]


def add(app: typer.Typer, group: str, function: Callable[..., object], *commands: str, name: str | None = None) -> None:
    """Register a command.

    Args:
        group: under which heading it is listed; the headings come in the order in which they are first used.
        commands: examples of its use, the most usual first.
        name: if it is not the function's.
    """
    app.command(name, rich_help_panel=group, epilog=examples(*commands))(function)


def examples(*commands: str) -> str:
    """Command lines for the end of a command's help, which are not wrapped."""
    return "\n".join(["\b", "Examples:" if len(commands) > 1 else "Example:", *(f"  {line}" for line in commands)])


def version_option(program: str) -> Any:
    """``--version`` for a program's callback. Imports none of the libraries that it names."""

    def answer(is_asked: bool) -> None:
        if is_asked:
            typer.echo(versions(program))
            raise typer.Exit

    text = "Print the versions of this program and of its libraries, and exit."
    return typer.Option("--version", callback=answer, is_eager=True, help=text)


def versions(program: str) -> str:
    """``k5train 0.1.0, torch 2.13.0, ...``"""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "(not installed)"

    named = {program: "kandinsky5-lora", **{package: package for package in _PACKAGES}}
    return ", ".join(f"{name} {installed(package)}" for name, package in named.items())
