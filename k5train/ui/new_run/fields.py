"""How is an option shown in a form, and what does a form's text mean? Made from the options themselves.

A field that is left empty leaves its option out of the recipe. ``""`` is an empty text, which is something else.
"""

from __future__ import annotations

import functools
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from k5cache.shared.model import ModelConfig
from k5cache.shared.option_list import Option, Table, tables, takes
from k5cache.shared.recipe import toml_value
from k5train.options.train import TrainConfig

Control = Literal["choice", "flag", "number", "text", "lines", "several", "pair"]
FIRST = (
    *("train.steps", "train.epochs", "train.lora.rank", "train.optim.lr", "train.batch_size"),
    *("train.gradient_accumulation_steps", "train.memory.vram", "train.base_model_precision", "train.lora.algo"),
    *("train.lora.targets", "train.optim.optimizer", "train.optim.lr_scheduler", "train.optim.warmup_steps"),
    *("train.caption_dropout_probability", "train.flow_schedule_shift", "train.validation.prompts"),
    *("train.validation.every", "train.validation.split", "train.checkpoint_every", "train.seed"),
)
"""The options that matter first, in the order in which a person decides them."""
ELSEWHERE = ("train.name",)
"""Options that the page asks for in another place."""
LEFT_OUT: Any = object()
"""The value of a field that leaves its option out of the recipe."""
_MOST_TOML = 200  # characters of a number


@dataclass(frozen=True)
class Field:
    """One option of a recipe, as a form shows it."""

    name: str
    """In full: ``train.lora.rank``."""
    control: Control
    hint: Any
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its last word."""
        return self.name.rpartition(".")[2]

    @property
    def is_first(self) -> bool:
        """Whether it is among the options that matter first."""
        return self.name in FIRST

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        return takes(self.hint).replace("`", "")

    @property
    def default_text(self) -> str:
        """Its default, as the field would show it; empty if there is none."""
        return "" if self.default is None else self._text_of(self.default)

    def is_changed(self, document: Mapping[str, Any]) -> bool:
        """Whether a recipe gives it another value than its default."""
        value = value_in(document, self.name)
        return value is not LEFT_OUT and value != _plain(self.default)

    def text_in(self, document: Mapping[str, Any]) -> str:
        """What the field shows of a recipe. Empty if the recipe leaves it out; a choice then shows the default."""
        value = value_in(document, self.name)
        if value is LEFT_OUT:
            return self.default_text if self.control in ("choice", "flag", "several") else ""
        return self._text_of(value)

    def value_of(self, text: str) -> Any:
        """What a text in the field means, as a TOML value. What is no such value stays a text, which the parser of
        recipes refuses in its own words."""
        if self.control == "flag":
            return text == "true"
        if self.control == "several":
            return text.split("\n") if text else []
        if not text.strip():
            return LEFT_OUT
        if self.control == "lines":
            return [_unquoted(line) for line in text.split("\n") if line.strip()]
        if self.control == "pair":
            return [_number(part) for part in text.split(",")]
        return _number(text) if self.control == "number" else _unquoted(text)

    def _text_of(self, value: Any) -> str:
        value = _plain(value)
        if self.control == "flag":
            return "true" if value is True else "false"
        is_list = isinstance(value, list)
        if self.control == "several":
            return "\n".join(entry for entry in value if entry in self.choices) if is_list else ""
        if self.control == "lines" and is_list:
            return "\n".join(_quoted(entry) for entry in value)
        if self.control == "pair" and is_list:
            return ", ".join(map(_quoted, value))
        return _quoted(value)


def value_in(document: Mapping[str, Any], name: str) -> Any:
    """The value of an option in a recipe; ``LEFT_OUT`` if the recipe does not give it."""
    value: Any = document
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return LEFT_OUT
        value = value[key]
    return value


@dataclass(frozen=True)
class Group:
    """One table of a recipe in the form."""

    name: str
    help: str
    fields: tuple[Field, ...]
    """Without those that matter first."""
    entries: tuple[Table, ...] = ()
    """The tables in it of which a recipe may have several; these are written in the text."""


@functools.cache
def groups() -> tuple[Group, ...]:
    """Every table of ``[model]`` and ``[train]``, in the order of a recipe."""
    found = list(tables({"model": ModelConfig, "train": TrainConfig}))
    return tuple(
        Group(
            table.name,
            _in_a_form(table.help.removeprefix(f"``[{table.name}]``: ")),
            tuple(field for field in _fields(table) if not field.is_first),
            tuple(t for t in found if t.listed and t.name.rpartition(".")[0] == table.name),
        )
        for table in found
        if not table.listed
    )


@functools.cache
def fields() -> Mapping[str, Field]:
    """Every field by its name, those that matter first at the beginning."""
    found = tables({"model": ModelConfig, "train": TrainConfig})
    by_name = {field.name: field for table in found if not table.listed for field in _fields(table)}
    return {name: by_name[name] for name in dict.fromkeys([*FIRST, *by_name])}


def _fields(table: Table) -> Iterator[Field]:
    for option in table.options:
        name = f"{table.name}.{option.name}"
        if takes(option.hint) != "tables" and name not in ELSEWHERE:
            yield _field(name, option)


def _field(name: str, option: Option) -> Field:
    hint, _ = without_none(option.hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    control: Control = "text"
    choices: tuple[str, ...] = ()
    if origin is Literal:
        control, choices = "choice", args
    elif hint is bool:
        control = "flag"
    elif hint in (int, float):
        control = "number"
    elif origin is tuple and typing.get_origin(args[0]) is Literal:
        control, choices = "several", typing.get_args(args[0])
    elif origin is tuple:
        control = "lines" if args[-1] is Ellipsis else "pair"
    default = None if option.default is MISSING else option.default
    return Field(name, control, option.hint, default, _in_a_form(option.help), choices)


def _in_a_form(text: str) -> str:
    """A docstring as a form says it, where None is a field that is left empty."""
    text = text.replace("``", "`").replace("None:", "Not set:")
    return text[:1].upper() + text[1:]


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type in ``X | None``, and whether it was one."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return args[0], len(args) < len(typing.get_args(hint))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _number(text: str) -> Any:
    """A number as TOML writes it, or the text."""
    text = text.strip()
    if len(text) <= _MOST_TOML and "\n" not in text:
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            return text
        if type(value) in (int, float, bool):
            return value
    return text


def _quoted(value: Any) -> str:
    """A value as a line of a field. A text that the field could not give back is written in quotes."""
    if type(value) is float:
        return _shortest(value)
    if not isinstance(value, str):
        return toml_value(value)
    is_plain = value and value == value.strip() and not value.startswith('"') and value.isprintable()
    return value if is_plain else toml_value(value)


def _shortest(value: float) -> str:
    """A number as a person would write it: ``1e-4``, ``0.05``."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    small = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent or 0)}"
    short = small if 0 < abs(value) < 1e-3 else f"{value:g}"
    return short if float(short) == value else repr(value)


def _unquoted(line: str) -> str:
    """The inverse of ``_quoted`` for a text."""
    line = line.strip()
    if line.startswith('"') and line.endswith('"') and "\n" not in line:
        try:
            value = tomllib.loads(f"value = {line}")["value"]
        except (ValueError, RecursionError):
            return line
        return value if isinstance(value, str) else line
    return line
