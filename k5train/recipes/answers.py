"""What must be known to write a recipe?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from k5cache.shared.console import parse_bytes
from k5cache.shared.model import FLAVOURS, path_problems

Goal = Literal["style", "character", "object", "edit"]
GOALS: tuple[Goal, ...] = get_args(Goal)
_STRATEGIES = ("textfile", "filename", "instanceprompt", "metadata")


@dataclass(frozen=True)
class Answers:
    """What is trained, on which images and on which card."""

    goal: Goal = "style"
    """``style``: how pictures look. ``character`` and ``object``: one being, one thing. ``edit``: what is done to a
    picture, which is image-to-image."""
    flavour: str = "t2i-lite-sft"
    """Of the published models."""
    vram: str | None = None
    """The card's memory, such as ``16GB``. None: what is free when the run starts."""
    num_images: int = 300
    """How many images, or pairs, there are."""
    trigger: str = ""
    """The word that calls up what is trained, in every caption. Empty: none."""
    prompts: tuple[str, ...] = ()
    """What is drawn while it trains; none for ``edit``, which draws pairs."""
    source: str = "datasets/my_images"
    """The images: a folder, a table, tars or a dataset; for ``edit`` the edited pictures."""
    sources: str | None = None
    """For ``edit``: the folder with the pictures before the edit. None: they are beside the others."""
    cache: str = "cache/my_images"
    """Where the cache is made."""
    recipe: str = "my.toml"
    """The recipe's own file, or its name among the packaged ones, as ``--recipe`` takes it."""
    caption_strategy: str = "textfile"
    """Where the captions come from, as ``cache.caption_strategy``."""
    instance_prompt: str | None = None
    """The one caption of all images, for ``instanceprompt``."""

    @property
    def gigabytes(self) -> float | None:
        """The card's memory as a number; a card of 12 GB has about as many GiB."""
        return None if self.vram is None else parse_bytes(self.vram) / 2**30

    def check(self) -> list[str]:
        """What cannot be, one phrase for each."""
        problems = [] if self.goal in GOALS else [f"goal must be one of {', '.join(GOALS)}, found {self.goal!r}"]
        if self.flavour not in FLAVOURS:
            problems.append(f"flavour must be one of {', '.join(FLAVOURS)}, found {self.flavour!r}")
        elif (self.goal == "edit") != self.flavour.startswith("i2i"):
            wanted = "an i2i" if self.goal == "edit" else "a t2i"
            problems.append(f"flavour must be {wanted} flavour for goal {self.goal}, found {self.flavour}")
        if self.vram is not None:
            try:
                parse_bytes(self.vram)
            except ValueError:
                problems.append(f'vram must be the size of a card such as "12GB", found {self.vram!r}')
        if self.num_images < 1:
            problems.append(f"num_images must be at least 1, found {self.num_images}")
        if self.caption_strategy not in _STRATEGIES:
            problems.append(
                f"caption_strategy must be one of {', '.join(_STRATEGIES)}, found {self.caption_strategy!r}"
            )
        elif (self.caption_strategy == "instanceprompt") != bool((self.instance_prompt or "").strip()):
            problems.append('instance_prompt and caption_strategy = "instanceprompt" need each other')
        if self.goal == "edit" and self.prompts:
            problems.append("prompts must be empty for goal edit, which draws pairs")
        for name in ("source", "cache", "recipe"):
            problems += path_problems(name, getattr(self, name))
        return problems
