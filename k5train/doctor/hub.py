"""Does the hub answer, and is the model on this machine already? Judged from facts, as values."""

from __future__ import annotations

from dataclasses import dataclass

from k5train.doctor.check import Check, Mark, environment


@dataclass(frozen=True)
class Hub:
    """What one short request to the hub met."""

    has_model: bool
    """Whether the model's transformer is on this machine."""
    is_folder: bool = False
    """Whether the user named a folder, so that the hub is not needed."""
    offline: str = ""
    """A variable that forbids requests, with its value."""
    has_token: bool = False
    status: int | None = None
    """The code of an answer that refuses."""
    problem: str = ""
    """Why there was no answer, or why it refuses; "" if it answered."""


def judge_hub(hub: Hub) -> Check:
    """Whether the model can be downloaded, or need not be."""
    here = "The model is on this machine." if hub.has_model else "The model is not on this machine yet."
    if hub.is_folder:
        mark: Mark = "good" if hub.has_model else "does not work"
        meaning = "It holds the transformer." if hub.has_model else "It lacks the transformer, or a file of it."
        return Check("hub", mark, "not asked: the model is a folder", meaning)
    if hub.offline:
        found = f"offline mode: {hub.offline} is set"
        if hub.has_model:
            return Check("hub", "good", found, f"{here} Nothing is asked of the hub.")
        variable = hub.offline.partition("=")[0]
        return Check(
            "hub",
            "does not work",
            found,
            f"{here} Download it once, or use --model DIR.",
            (environment(variable),),
        )
    token = "a token is set" if hub.has_token else "no token is set"
    if not hub.problem:
        accepted = "a token is set and accepted" if hub.has_token else "no token is set, none is needed for this model"
        return Check("hub", "good", f"the hub answers; {accepted}", here)
    if hub.status in (401, 403) and hub.has_token:
        meaning = "A public model needs no token, but one that is wrong is refused. Log in again, or log out:"
        mark = "look at this" if hub.has_model else "does not work"
        found = "the hub refuses the token that is set"
        return Check("hub", mark, found, meaning, ("hf auth login", "hf auth logout"))
    asked = f"the hub refuses with {hub.status}" if hub.status else "the hub does not answer"
    found = f"{asked}: {hub.problem}; {token}"
    if hub.has_model:
        return Check("hub", "look at this", found, f"{here} The downloaded copy is used.")
    return Check("hub", "does not work", found, f"{here} Connect once, or give a folder that has it with --model DIR.")
