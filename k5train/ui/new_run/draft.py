"""What does the form say? What was typed into its fields and into its text, brought together into one recipe.

The form is sent with the text that its fields were made from. A field that differs from that text was changed by a
person, and so was a text that differs from it; both changes count. Nothing is lost while the text is no TOML: then the
fields are sent back as they are.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from k5train.ui.new_run.checked import is_too_long
from k5train.ui.new_run.edited import with_value
from k5train.ui.new_run.fields import LEFT_OUT, fields, value_in
from k5train.ui.new_run.starts import Start

OPTION = "o."
"""With this begins the name of an option's field in the form."""
_MOST_ITEMS = 100


@dataclass(frozen=True)
class Draft:
    """A run as it is being prepared."""

    text: str
    """Its recipe as TOML, the fields' changes in it."""
    base: str = ""
    """The text that the fields on the page were made from."""
    typed: Mapping[str, str] = field(default_factory=dict)
    """What stands in fields, while the text is no TOML and they cannot be brought into it."""
    caches: tuple[str, ...] = ()
    """Ids of the chosen caches."""
    name: str = ""
    """Of the run; empty for the name that is proposed."""
    file: str = ""
    """The id of the project's recipe that is edited; empty if it comes from elsewhere."""
    seen: str = ""
    """A hash of that file as it was read."""
    save_as: str = ""
    """The name of the file to save it in."""
    title: str = ""
    """What it started from."""
    axes: tuple[tuple[str, str], ...] = ()
    """Of a sweep: an option and its values."""
    replaces: str = ""
    """A hash of the file that may be replaced."""
    gpus: int = 1
    """How many runs of a sweep are trained at a time, each on a GPU of its own."""

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The recipe's values; of the text that the fields were made from while the text is no TOML."""
        return _values(self.text) or _values(self.base) or {}

    def text_of(self, name: str) -> str:
        """What the field of an option shows."""
        return self.typed.get(name, fields()[name].text_in(self.document))


def begun(start: Start) -> Draft:
    """The form as it first appears."""
    file = start.file
    return Draft(start.text, start.text, {}, start.caches, "", file.id if file else "", file.seen if file else "",
                 start.save_as, start.title)  # fmt: skip


def sent(form: Mapping[str, Sequence[str]]) -> Draft:
    """The form as it was sent.

    Args:
        form: the values of each of its names. A name that is missing changes nothing.
    """
    given = {name: [_lines(value) for value in values] for name, values in form.items()}

    def one(name: str) -> str:
        return (given.get(name) or [""])[-1]

    axes = zip(given.get("axis", [])[:_MOST_ITEMS], given.get("values", [])[:_MOST_ITEMS], strict=False)
    draft = Draft(
        one("text"), one("base") or one("text"), {}, tuple(given.get("cache", [])[:_MOST_ITEMS]), one("name").strip(),
        one("file"), one("seen"), one("save_as").strip(), one("title")[:_MOST_ITEMS],
        tuple((option, values.strip()) for option, values in axes if values.strip()), one("replaces"),
        int(one("gpus")) if re.fullmatch(r"[1-9]\d?", one("gpus"), re.ASCII) else 1,
    )  # fmt: skip
    return _with_fields(draft, given)


def _with_fields(draft: Draft, form: Mapping[str, Sequence[str]]) -> Draft:
    before = _values(draft.base) or {}
    typed = {}
    for name, option in fields().items():
        if OPTION + name in form:
            values = form[OPTION + name]
            # Of a box that is not ticked, only the hidden field before it is sent.
            text = "\n".join(v for v in values if v) if option.control == "several" else values[-1]
            if text != option.text_in(before):
                typed[name] = text
    text = draft.text
    if _values(text) is None:
        return replace(draft, typed=typed)
    for name, shown in typed.items():
        option = fields()[name]
        value = option.value_of(shown)
        if not _is_same(value_in(tomllib.loads(text), name), value):
            text = with_value(text, option, value)
    return replace(draft, text=text)


def _is_same(a: Any, b: Any) -> bool:
    """``1`` and ``True`` are two values, and ``1`` and ``1.0`` are one."""
    return a is b or (a is not LEFT_OUT and b is not LEFT_OUT and a == b and isinstance(a, bool) == isinstance(b, bool))


def _values(text: str) -> dict[str, Any] | None:
    """The values of a text; None if it is no TOML."""
    try:
        return None if is_too_long(text) else tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(value: str) -> str:
    return value.replace("\r\n", "\n")
