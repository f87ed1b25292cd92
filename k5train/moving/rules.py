"""What is done with a key of another trainer? A table of rules for each trainer, which the pages show too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from k5cache.shared.other_words import ANYTHING, WORDS, our_value
from k5train.moving.credentials import is_credential
from k5train.moving.draft import Draft, Entry

Act = Callable[[Draft, Entry], None]
SAME = "this is what happens here anyway"
_LOGIN = "credentials are not copied: log in with `hf auth login` or `wandb login`"


@dataclass(frozen=True)
class Rule:
    """What is done with one key, and how a page says it."""

    says: str
    act: Act


Rules = Mapping[str, Rule]


def apply(draft: Draft, rules: Rules, where: str, values: Mapping[str, Any]) -> None:
    """Say of each key what becomes of it, and take over what can be."""
    for key, value in values.items():
        entry = Entry(where, key, value)
        if is_credential(key, value):
            draft.say(entry, "not needed", _LOGIN)
        elif value is None or value == "" or value == "None":
            draft.say(entry, "not needed", "it is not set")
        elif key in rules:
            rules[key].act(draft, entry)
        else:
            draft.say(entry, "unknown", "no key of this trainer that is known here")


def takes(option: str, values: Mapping[Any, Any] | None = None, note: str = "") -> Rule:
    """A key that is an option here.

    Args:
        values: what some of its values are called here.
    """

    def act(draft: Draft, entry: Entry) -> None:
        value = our_value(option, entry.value)
        value = values.get(value, value) if values and isinstance(value, str | bool) else value
        draft.take(entry, option, value, note)

    return Rule(f"`{option}`", act)


def takes_choice(option: str, values: Mapping[str, str], instead: str = "") -> Rule:
    """A key whose values have other names here; those without one are not supported.

    Args:
        instead: what to say of those.
    """

    def act(draft: Draft, entry: Entry) -> None:
        name = str(entry.value).lower()
        if name in values:
            draft.take(entry, option, values[name])
        else:
            draft.say(entry, "not supported", instead or f"{option} has {', '.join(sorted(set(values.values())))}")

    return Rule(f"`{option}`", act)


def needless(because: str) -> Rule:
    """A key that needs nothing here, whatever its value."""
    return Rule(f"not needed: {because}", lambda draft, entry: draft.say(entry, "not needed", because))


def unsupported(why: str, *harmless: Any) -> Rule:
    """A key that does not exist here.

    Args:
        harmless: values that ask for what happens here anyway.
    """
    values = {str(value).lower() for value in harmless}

    def act(draft: Draft, entry: Entry) -> None:
        if _plain(entry.value) in values:
            draft.say(entry, "not needed", SAME)
        else:
            draft.say(entry, "not supported", why)

    allowed = f", unless it is {' or '.join(f'`{_plain(value)}`' for value in harmless)}" if harmless else ""
    return Rule(f"not supported{allowed}: {why}", act)


def _plain(value: Any) -> str:
    """``0.0``, ``0`` and ``"0"`` are the same."""
    text = str(value).lower()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def special(says: str, act: Act) -> Rule:
    """A key that needs a function of its own."""
    return Rule(says, act)


def words(*names: str) -> dict[str, Rule]:
    """Keys whose meaning is in the table of other trainers' words."""
    return {name: _of_word(name) for name in names}


def _of_word(name: str) -> Rule:
    word = WORDS[name]
    because = word.because or SAME

    def act(draft: Draft, entry: Entry) -> None:
        if word.asks_nothing(entry.value):
            draft.say(entry, "not needed", because)
        elif word.option:
            draft.take(entry, word.option, our_value(word.option, entry.value))
        else:
            draft.say(entry, "not supported", f"it {word.why}")

    if ANYTHING in word.harmless:
        return Rule(f"not needed: {because}", act)
    if word.option:
        return Rule(f"`{word.option}`", act)
    allowed = " or ".join(f"`{_plain(value)}`" for value in word.harmless)
    return Rule(f"not supported{f', unless it is {allowed}' if allowed else ''}: it {word.why}", act)


def takes_for_cache(option: str, values: Mapping[str, str] | None = None) -> Rule:
    """A key of some data that is an option of its cache.

    Args:
        values: what its values are called here; those without a name here are not supported. None: as they are.
    """

    def act(draft: Draft, entry: Entry) -> None:
        value = our_value(option, entry.value)
        if values is None:
            draft.take(entry, option, value, is_of_cache=True)
        elif str(value).lower() in values:
            draft.take(entry, option, values[str(value).lower()], is_of_cache=True)
        else:
            draft.say(entry, "not supported", f"{option} has {', '.join(sorted(set(values.values())))}")

    return Rule(f"`{option}`", act)


def many(rule: Rule, *names: str) -> dict[str, Rule]:
    """One rule for several keys."""
    return dict.fromkeys(names, rule)
