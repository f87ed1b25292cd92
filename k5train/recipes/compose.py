"""How do answers become the text of a recipe?"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from k5cache.shared.command_line import command
from k5cache.shared.errors import RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.recipe import toml_value
from k5train.options.train import TrainConfig
from k5train.recipes.amounts import SHOWN, rows_of_update, usual_steps
from k5train.recipes.answers import Answers
from k5train.recipes.needs import needs_of
from k5train.recipes.others import official, quick, simpletuner
from k5train.recipes.values import Value, values_for

_WIDTH = 116
_TITLES = {
    "style": "A LoRA for a style: how pictures look.",
    "character": "A LoRA for a character: one person, animal or figure.",
    "object": "A LoRA for an object: one thing.",
    "edit": "A LoRA for an edit, image-to-image: what is done to a picture, taught by pairs before and after.",
}
_OTHERS = {"official": official, "simpletuner": simpletuner, "quick": quick}


def compose(answers: Answers, preset: str | None = None) -> str:
    """The whole recipe as TOML: the commands that use it, what it needs, and each value with its trade-off.

    Args:
        preset: ``official`` or ``simpletuner``: the values of that trainer instead of ours.

    Raises:
        RecipeError: an answer cannot be.
    """
    if problems := answers.check():
        raise RecipeError("; ".join(problems), "Correct that answer")
    values = values_of(answers, preset)
    opening = _OTHERS[preset].__doc__ or "" if preset else _title(answers)
    lines = [*_wrapped(opening), "#", *(f"#   {line}" for line in commands(answers, preset)), "#"]
    for paragraph in (_how_to_change(answers), needs_of(values), _about_steps(answers)):
        lines += [*_wrapped(paragraph), "#"]
    lines += [*_table_of_steps(answers), "#", *_wrapped(_WHAT_IS_UNSET)]
    lines += _tables(values)
    if answers.goal in ("character", "object") and not preset:
        lines += ["", *_REGULARISATION]
    return "\n".join(lines) + "\n"


def values_of(answers: Answers, preset: str | None = None) -> list[Value]:
    """The values of a recipe, ours or those of another trainer."""
    return _OTHERS[preset](answers) if preset else values_for(answers)


_WHAT_IS_UNSET = (
    "`k5train options` lists every option with its help; those that are not set here stay as it says. "
    "The pages of docs/ are in the repository of this program."
)
_REGULARISATION = """\
# Regularisation data: pictures of other people or things, in half of the rows. It keeps them as they are, and the LoRA
# then takes twice the steps: measured on k5-micro, docs/settings.md. Encode them without the trigger, take the # off
# below, and leave the cache out of the k5train command.
#
# [[train.data]]
# cache = "cache/my_images"
# weight = 1.0
#
# [[train.data]]
# cache = "cache/others"
# weight = 1.0
# is_regularisation_data = true""".splitlines()


def commands(answers: Answers, preset: str | None = None) -> list[str]:
    """The commands that use the recipe, to copy."""
    recipe = answers.recipe
    encode = command("k5cache", "encode", answers.source, sources=answers.sources, recipe=recipe)
    lines = [f"{encode} {command('-o', answers.cache)}", command("k5train", "run", answers.cache, recipe=recipe)]
    if recipe.endswith(".toml") and preset is None:  # one of the user's own: configure offers its answers again
        asked: dict[str, Any] = {"goal": answers.goal, "images": answers.num_images, "sources": answers.sources}
        lines.append(command("k5train", "configure", answers.source, **asked, out=recipe))
    return [shown(line, 4000) for line in lines]


def _title(answers: Answers) -> str:
    size = re.sub(r"(?<=\d)(?=[A-Za-z])", " ", answers.vram or "")
    card = f" On a card of {size}," if size else " On any card,"
    return f"{_TITLES[answers.goal]}{card} from about {answers.num_images} {_images(answers)}."


def _images(answers: Answers) -> str:
    return "pairs" if answers.goal == "edit" else "images"


def _how_to_change(answers: Answers) -> str:
    if answers.recipe.endswith(".toml"):
        return "Change any value here, or on the command line: --set train.steps=500."
    return (
        f"To change it: `k5train recipes {answers.recipe} -o my.toml`, then --recipe my.toml; or one value on the "
        "command line: --set train.steps=500."
    )


def _about_steps(answers: Answers) -> str:
    rows = rows_of_update(answers.num_images)
    of_rows = f"{rows} rows each" if rows > 1 else "one row each"
    return (
        f"Usual steps, of {of_rows}. They are common practice and were not measured on the published model; a style "
        "that is close to what the model knows needs fewer."
    )


def _table_of_steps(answers: Answers) -> Iterator[str]:
    rows = rows_of_update(answers.num_images)
    counts = [usual_steps(answers.goal, number, rows) for number in SHOWN]
    for name, numbers in ((_images(answers), SHOWN), ("steps", counts)):
        yield f"#   {name:<8}" + "".join(f"{number:>8,}" for number in numbers)


def _tables(values: Sequence[Value]) -> Iterator[str]:
    table = ""
    for value in values:
        name, _, key = value.option.rpartition(".")
        if name != table:
            yield from ("", f"[{name}]")
            table = name
        yield from _wrapped(value.why + _when_left_out(value))
        yield from _assigned(key, value.value)


def _assigned(key: str, value: Any) -> Iterator[str]:
    """A value in one line, or a list with one entry a line where that is too long."""
    line = f"{key} = {_written(value)}"
    if len(line) <= _WIDTH or not isinstance(value, list):
        yield line
        return
    yield f"{key} = ["
    yield from (f"    {toml_value(entry)}," for entry in value)
    yield "]"


def _written(value: Any) -> str:
    text = toml_value(value)
    return "1e-4" if text == "0.0001" else text


def _when_left_out(value: Value) -> str:
    """What the option would be without the line, if that is another value."""
    if not value.option.startswith("train."):
        return ""
    other: Any = TrainConfig()
    for key in value.option.split(".")[1:]:
        other = getattr(other, key)
    if isinstance(other, tuple):
        other = list(other)
    if dataclasses.is_dataclass(other) or other is None or other in ([], value.value):
        return ""
    return f" Left out, it is {_written(other)}."


def _wrapped(text: str) -> list[str]:
    words = " ".join(text.split())
    return textwrap.wrap(words, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
