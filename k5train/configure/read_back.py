"""Which answers is a recipe made of? Read from its values, and from the commands in the comment that opens it."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

_COMMAND = re.compile(r"^#\s*(k5(?:cache|train) .*)$", re.MULTILINE)
_TITLE = re.compile(
    r"\A# A LoRA for an? (style|character|object|edit)\b[^\0]{0,300}?from\s(?:#\s)?about\s(?:#\s)?(\d+)"
)
_VALUES = {
    "flavour": "model.flavour", "vram": "train.memory.vram", "trigger": "cache.trigger",
    "caption_strategy": "cache.caption_strategy", "instance_prompt": "cache.instance_prompt",
    "prompts": "train.validation.prompts",
}  # fmt: skip
"""Answer -> the option that it is in a recipe."""
_SHORT = {"--out": "-o", "-r": "--recipe"}


def answers_of(text: str) -> dict[str, Any]:
    """The answers that a recipe tells, by their names in ``Answers``.

    A value that was edited by hand is the answer. One of another type is none.

    Args:
        text: valid TOML.
    """
    values = flat(tomllib.loads(text))
    answers: dict[str, Any] = {"trigger": ""}
    if title := _TITLE.search(text):
        answers |= {"goal": title[1], "num_images": int(title[2].replace(",", ""))}
    for command in _commands(text):
        words, options = _split(command)
        if words[:2] == ["k5cache", "encode"]:
            answers |= {"source": words[2]} if len(words) > 2 else {}
            names = {"cache": "-o", "sources": "--sources", "recipe": "--recipe"}
            answers |= {name: options[key] for name, key in names.items() if key in options}
        if words[:2] == ["k5train", "configure"]:
            answers |= {"source": words[2]} if len(words) > 2 else {}
            answers |= {name: options[f"--{name}"] for name in ("goal", "sources") if f"--{name}" in options}
            if options.get("--images", "").isdecimal():
                answers["num_images"] = int(options["--images"])
    if str(values.get("model.flavour", "")).startswith("i2i"):
        answers["goal"] = "edit"
    for name, option in _VALUES.items():
        value = values.get(option)
        if isinstance(value, str) and name != "prompts":
            answers[name] = value
        elif name == "prompts" and isinstance(value, list) and all(isinstance(prompt, str) for prompt in value):
            answers[name] = tuple(value)
    return answers


def edits(before: str, written: str) -> list[str]:
    """What a recipe says otherwise than it was written: ``train.steps = 2000 instead of 1500``."""
    ours, theirs = flat(tomllib.loads(before)), flat(tomllib.loads(written))
    return [
        f"{name} = {_said(ours, name)} instead of {_said(theirs, name)}"
        for name in dict.fromkeys([*theirs, *ours])
        if ours.get(name) != theirs.get(name)
    ]


def flat(tables: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """``{"train": {"steps": 5}}`` -> ``{"train.steps": 5}``."""
    values: dict[str, Any] = {}
    for key, value in tables.items():
        full = f"{name}.{key}" if name else key
        values |= flat(value, full) if isinstance(value, dict) else {full: value}
    return values


def _said(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "unset"


def _commands(text: str) -> Iterator[list[str]]:
    for line in _COMMAND.findall(text.replace("\\\n#", "")):
        try:
            yield shlex.split(line, comments=True)
        except ValueError:  # somebody's own comment
            continue


def _split(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command without its options, and its options with their values."""
    words: list[str] = []
    options: dict[str, str] = {}
    rest = iter(command)
    for word in rest:
        if word.startswith("-") and len(word) > 1:
            name, equals, value = word.partition("=")
            options[_SHORT.get(name, name)] = value if equals else next(rest, "")
        else:
            words.append(word)
    return words, options
