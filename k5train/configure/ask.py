"""How is a question asked and answered? At a terminal with a second try, over a pipe line by line, or not at all."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.text import Text

from k5cache.shared import console
from k5cache.shared.errors import K5Error, RecipeError
from k5cache.shared.foreign import shown

T = TypeVar("T")
NOTHING = "-"
"""The answer that takes an offered one back."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """One question. Its answer is also an option of the command."""

    text: str
    option: str
    """Such as ``--goal``; SOURCE for the argument."""
    check: Callable[[str], T]
    """An answer to its value. Raises ``K5Error`` for one that cannot be."""
    default: str | None = None
    """The answer of an empty line. None: there must be one."""
    help: Sequence[str] = ()
    """Lines under the question."""


class Asker:
    """Asks on stderr, reads from stdin.

    Args:
        is_silent: ask nothing: every question has its default.
    """

    def __init__(self, is_silent: bool = False) -> None:
        self.is_at_end = is_silent or sys.stdin is None
        self.is_terminal = not self.is_at_end and sys.stdin.isatty()
        # Arrow keys work where Python has readline, which draws on stdout.
        self.has_arrows = self.is_terminal and sys.stdout.isatty() and importlib.util.find_spec("readline") is not None
        self.num_lines = 0

    def ask(self, question: Question[T], given: str | None = None) -> T:
        """The value of the option if it is given, or of the first answer that the question takes.

        Raises:
            K5Error: the option, or an answer that does not come from a person, cannot be.
        """
        if given is not None:
            return _of_option(question, given)
        self._put(question)
        while True:
            line = self._line("> ")
            answer = (line or "").strip() or question.default
            if answer is None and (line is None or not self.is_terminal):
                raise RecipeError(f"There is no answer to: {question.text}", _how_to_give(question.option))
            if not self.is_terminal:
                _echo(question, answer or "-", line)
            try:
                if answer is None:
                    raise RecipeError("This question needs an answer", "Type one, or stop with Ctrl-C")
                return question.check("" if answer == NOTHING else answer)
            except K5Error as error:
                if not self.is_terminal or line is None:
                    raise self._told(error, question, line) from None
                console.print_error(error.problem, error.fix)

    def ask_lines(self, question: Question[T], defaults: Sequence[str], given: Sequence[str] | None = None) -> list[T]:
        """As ``ask``, with several answers, one a line. An empty line is the end; ``-`` alone means none."""
        if given is not None:
            return [_of_option(question, text) for text in given if text not in ("", NOTHING)]
        self._put(question)
        if self.is_terminal:
            for default in defaults:
                console.err.print(Text(f"    {shown(default)}", style="dim"))
        values: list[T] = []
        while line := self._line("> "):
            answer = line.strip()
            if not answer:
                break
            if not self.is_terminal:
                _echo(question, answer, line)
            if answer == NOTHING:
                return values
            try:
                values.append(question.check(answer))
            except K5Error as error:
                if not self.is_terminal:
                    raise self._told(error, question, line) from None
                console.print_error(error.problem, error.fix)
        if values:
            return values
        if not self.is_terminal:
            for default in defaults:
                _echo(question, default, None)
        return [question.check(default) for default in defaults]

    def _put(self, question: Question[T]) -> None:
        """Show a question to a person."""
        if not self.is_terminal:
            return
        default = f" [{shown(question.default)}]" if question.default else ""
        console.err.print(Text.assemble((question.text, "bold"), (default, "cyan")))
        for line in question.help:
            console.err.print(Text(f"  {line}", style="dim"))

    def _line(self, prompt: str) -> str | None:
        """The next line of the answers. None at their end, and from then on."""
        if self.is_at_end:
            return None
        try:
            line = self._read(prompt)
        except KeyboardInterrupt:
            console.err.print()  # what follows begins a line
            raise
        except UnicodeDecodeError:
            raise RecipeError(
                f"Line {self.num_lines + 1} of the answers is not UTF-8", "Save the answers as UTF-8"
            ) from None
        self.num_lines += 1
        if not line:  # Ctrl-D, or the end of the pipe
            if self.is_terminal:
                console.err.print()
            self.is_at_end, self.is_terminal = True, False
        return line or None

    def _read(self, prompt: str) -> str:
        if not self.has_arrows:
            if self.is_terminal:
                console.err.print(Text(prompt), end="")
            return sys.stdin.readline()
        importlib.import_module("readline")
        console.err.file.flush()
        try:
            return f"{input(prompt)}\n"
        except EOFError:
            return ""

    def _told(self, error: K5Error, question: Question[T], line: str | None) -> K5Error:
        where = f"Line {self.num_lines} of the answers" if line else f"The default of {question.option}"
        return RecipeError(f"{where}: {error.problem}", f"{error.fix}; or give it with {question.option}")


def _how_to_give(option: str) -> str:
    if option.startswith("-"):
        return f"Give it with {option}"
    return f"Give it behind the command: k5train configure {option}"


def _echo(question: Question[T], answer: str, line: str | None) -> None:
    """One line for the log of a command that nobody watches."""
    is_default = not (line or "").strip()
    console.note(f"{question.text} {shown(answer)}{f' (the default; {question.option} sets it)' if is_default else ''}")


def _of_option(question: Question[T], given: str) -> T:
    try:
        return question.check("" if given == NOTHING else given)
    except K5Error as error:
        raise RecipeError(f"{question.option} {shown(given)}: {error.problem}", error.fix) from None


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A check that takes one of ``choices``: by its number, its beginning, or its part behind the last hyphen."""

    def check(answer: str) -> str:
        word = answer.strip().lower()
        if word.isdecimal() and 1 <= int(word) <= len(choices):
            return choices[int(word) - 1]
        meant = [choice for choice in choices if word and (choice.startswith(word) or choice.endswith(f"-{word}"))]
        exact = [choice for choice in meant if choice == word]
        if len(exact or meant) != 1:
            raise RecipeError(f"{shown(answer)!r} is none of {', '.join(choices)}", f"Answer with 1 to {len(choices)}")
        return (exact or meant)[0]

    return check


def is_yes(answer: str) -> bool:
    """A check for yes and no."""
    word = answer.strip().lower()
    if word not in ("y", "yes", "n", "no"):
        raise RecipeError(f"{shown(answer)!r} is neither yes nor no", "Answer y or n")
    return word in ("y", "yes")
