"""How does a draft become a recipe, and which commands follow it?"""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.command_line import command
from k5cache.shared.errors import OutputError, RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.inside import as_file_names
from k5cache.shared.outputs import HARMLESS, check_file, kind_of
from k5cache.shared.plain import read_text
from k5cache.shared.recipe import parse, to_dict, toml_value
from k5train.moving.draft import CacheDraft, Draft, Row

_MADE = "# Made by `k5train import` of"
_CORE = {
    "train.steps": "train.epochs", "train.batch_size": "", "train.lora.rank": "", "train.lora.targets": "",
    "train.optim.lr": "", "train.flow_schedule_shift": "", "train.caption_dropout_probability": "",
    "train.base_model_precision": "", "train.optim.warmup_steps": "",
}  # fmt: skip
"""Options whose default a person should know of -> the option that stands in for it."""


@dataclass(frozen=True)
class Moved:
    """A recipe and what follows it."""

    trainer: str
    rows: list[Row]
    text: str
    """Of the recipe."""
    commands: list[str]
    defaults: dict[str, Any]
    """Important options that the setup does not name, with the value that they have here."""


def moved(draft: Draft, trainer: str, config: Path, recipe: Path) -> Moved:
    """The recipe of a draft.

    Args:
        trainer: whose setup it was.
        config: its file.
        recipe: where the recipe will be.

    Raises:
        RecipeError: our own checks refuse it.
    """
    _settle(draft)
    name_caches(draft)
    tables = _tables(draft)
    try:
        configs = parse(tables, dict(draft.schemas))
    except RecipeError as error:
        raise RecipeError(f"{config} cannot be taken over: {error.problem}", "Correct it there") from None
    whole = dict(zip(draft.schemas, map(to_dict, configs), strict=True))
    defaults = {
        option: _look_up(whole, option) or "unset"
        for option, other in _CORE.items()
        if option not in draft.taken and other not in draft.taken
    }
    commands = list(_commands(draft, recipe))
    text = _text(draft, trainer, config, commands, defaults)
    return Moved(trainer, draft.rows, text, commands, defaults)


def check_target(path: Path, text: str) -> Path:
    """Where to write a recipe, if nothing that a person wrote is lost.

    Raises:
        OutputError: another file is there, or a recipe that has been edited since it was made.
    """
    target = check_file(path, ".toml")
    if target.exists():
        try:
            before = read_text(target)
        except (OSError, UnicodeDecodeError):
            before = ""
        if before != text and not _is_unedited(before):
            edited = before.startswith(_MADE)
            raise OutputError(
                f"{path} is there already, and {'has been edited since it was made' if edited else 'is not of this'}"
                f"{'' if edited else ' command'}",
                f"Choose another name: {command('-o', path.with_name(f'{path.stem}-2.toml'))}",
            )
    return target


def _is_unedited(text: str) -> bool:
    first, _, rest = text.partition("\n")
    return first.startswith(_MADE) and first.endswith(_checksum(rest))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def _settle(draft: Draft) -> None:
    """Leave out what cannot be combined here, and say so."""
    if draft.value("train.optim.optimizer") == "schedulefree":
        for option in ("train.optim.lr_scheduler", "train.optim.ema_decay"):
            if draft.value(option) not in (None, "constant"):
                draft.drop(option, "schedulefree averages by itself, without a schedule and without ema_decay")
    algo = draft.value("train.lora.algo")
    if algo == "lokr":
        for option in ("alpha", "dropout", "init_lora"):
            draft.drop(f"train.lora.{option}", f"a LoKr has no {option} here")
    if algo == "dora":
        draft.drop("train.lora.init_lora", "a DoRA has magnitudes, which the file does not")
    if draft.value("train.base_model_precision") == "no_change" and draft.value("train.memory.enable_group_offload"):
        draft.drop("train.memory.enable_group_offload", "it moves int8 weights, and base_model_precision is no_change")
    if draft.value("train.objective.flow_schedule_auto_shift") and draft.value("train.flow_schedule_shift") != 1:
        draft.drop("train.flow_schedule_shift", "train.objective.flow_schedule_auto_shift replaces it")
    if draft.value("train.steps") is not None:
        draft.drop("train.epochs", "train.steps says how long it trains")
    if str(draft.value("model.flavour")).startswith("i2i"):
        for option in ("prompts", "prompt_names", "prompt_library", "negative_prompt"):
            draft.drop(f"train.validation.{option}", "image-to-image draws pairs: [[train.validation.edits]]")


def name_caches(draft: Draft) -> None:
    """Give each cache a folder of its own, which is new or a cache."""
    names = as_file_names(cache.name for cache in draft.caches)
    for cache, name in zip(draft.caches, names, strict=True):
        path = Path("cache") / name
        is_free = not _holds_anything(path) or kind_of(path) == "cache"
        cache.name = path.as_posix() if is_free else f"{path.as_posix()}-k5"


def _holds_anything(path: Path) -> bool:
    try:
        if not path.is_dir():
            return path.exists()
        return any(not HARMLESS.fullmatch(entry) for entry in os.listdir(path))  # noqa: PTH208 (names only)
    except (OSError, ValueError):
        return True


def _tables(draft: Draft) -> dict[str, Any]:
    tables: dict[str, Any] = {table: {} for table in draft.schemas}
    for option, taken in draft.taken.items():
        *path, key = option.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[key] = taken.value
    tables["cache"].update(_common(draft.caches))
    if len(draft.caches) == 1 and draft.caches[0].repeats != 1 and not _needs_data(draft):
        tables["train"]["repeats"] = draft.caches[0].repeats
    if _needs_data(draft):
        tables["train"]["data"] = [_data(cache) for cache in draft.caches]
    return {name: table for name, table in tables.items() if table}


def _needs_data(draft: Draft) -> bool:
    return len(draft.caches) > 1 or any(cache.is_regularisation_data for cache in draft.caches)


def _data(cache: CacheDraft) -> dict[str, Any]:
    entry: dict[str, Any] = {"cache": cache.name}
    if cache.weight is not None:
        entry["weight"] = cache.weight
    if cache.repeats != 1:
        entry["repeats"] = cache.repeats
    if cache.is_regularisation_data:
        entry["is_regularisation_data"] = True
    return entry


def _look_up(tables: Mapping[str, Any], option: str) -> Any:
    value: Any = tables
    for key in option.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _commands(draft: Draft, recipe: Path) -> Iterator[str]:
    common = _common(draft.caches)
    for cache in draft.caches or [CacheDraft("cache/my_images", "FOLDER")]:
        own = {key: value for key, value in cache.options.items() if key not in common}
        overrides = [f"cache.{key}={toml_value(value)}" for key, value in own.items()]
        options: dict[str, Any] = {"sources": cache.sources, "recipe": recipe, "set": overrides, "out": cache.name}
        yield command("k5cache", "encode", cache.source, **options)
    root = Path(draft.run) if draft.run else None
    out = root if root and not (_holds_anything(root) and kind_of(root) != "run") else None
    one = [] if _needs_data(draft) else [draft.caches[0].name if draft.caches else "cache/my_images"]
    yield command("k5train", "run", *one, recipe=recipe, out=out)


def _common(caches: Sequence[CacheDraft]) -> dict[str, Any]:
    """The options that all caches have alike. Those of one cache alone are in its command."""
    if not caches:
        return {}
    first, *others = (cache.options for cache in caches)
    common = {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}
    if common.get("caption_strategy") == "instanceprompt" and "instance_prompt" not in common:
        del common["caption_strategy"]  # the two need each other
    return common


def _text(draft: Draft, trainer: str, config: Path, commands: list[str], defaults: Mapping[str, Any]) -> str:
    """The recipe as TOML, with the name that each value had."""
    lines = ["#", *(f"#   {shown(line, 4000)}" for line in commands), "#"]
    lines += _wrapped("`k5train options` lists every option, and those that are not set here have their defaults.")
    if defaults:
        named = ", ".join(f"{option} = {value}" for option, value in defaults.items())
        lines += _wrapped(f"Of these, the other trainer may have had other values: {named}")
    for outcome in ("not supported", "unknown"):
        rows = [row for row in draft.rows if row.outcome == outcome]
        if rows:
            lines += ["#", f"# {'Not supported here' if outcome == 'not supported' else 'Unknown keys'}:"]
        for row in rows:
            lines += _wrapped(f"{shown(row.key, 80)}: {shown(row.text, 300)}", "  ")
    keys = {option: taken.key for option, taken in draft.taken.items()}
    for name, table in _tables(draft).items():
        lines += _emit(name, table, keys)
    body = "\n".join(lines) + "\n"
    return f"{_MADE} {shown(str(config), 200)} ({trainer}); sha256 {_checksum(body)}\n{body}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    prefix = f"# {indent}"
    return textwrap.wrap(text, 116, initial_indent=prefix, subsequent_indent=f"{prefix}  " if indent else prefix)


def _emit(name: str, table: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[str]:
    inner = {k: v for k, v in table.items() if isinstance(v, dict)}
    arrays = {k: v for k, v in table.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    plain = {k: v for k, v in table.items() if k not in inner and k not in arrays}
    if plain:
        yield from ("", f"[{name}]")
    for key, value in plain.items():
        there = keys.get(f"{name}.{key}")
        is_other = there and there != key and not there.startswith("(")
        comment = f"  # {shown(str(there), 80)}" if is_other else ""
        yield f"{key} = {toml_value(value)}{comment}"
    for key, entries in arrays.items():
        for entry in entries:
            yield from ("", f"[[{name}.{key}]]")
            yield from (f"{k} = {toml_value(v)}" for k, v in entry.items())
    for key, value in inner.items():
        yield from _emit(f"{name}.{key}", value, keys)
