"""``[train.validation]`` and ``[train.trackers]``: the options of pictures, held-out loss and trackers.

The docstring under an option is its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from k5cache.buckets import MAX_SIDE, SIDE_MULTIPLE, is_side
from k5cache.shared.inside import name_problem
from k5cache.shared.model import path_problems
from k5cache.shared.units import count_of


@dataclass(frozen=True)
class EditConfig:
    """``[[train.validation.edits]]``: a picture and what to do with it."""

    source: str
    """The picture that is edited."""
    prompt: str
    """The instruction. `k5cache encode` puts the pair into the cache, so no encoder is loaded here."""

    def check(self) -> list[str]:
        """What cannot be a picture."""
        return path_problems("source", self.source)


@dataclass(frozen=True)
class ValidationConfig:
    """``[train.validation]``: pictures drawn during the run from cached prompts, and the held-out loss."""

    prompts: tuple[str, ...] = ()
    """The prompts to draw. `k5cache encode` puts them into the cache, so no text encoder is loaded here."""
    negative_prompt: str = ""
    """The prompt that guidance moves away from."""
    edits: tuple[EditConfig, ...] = ()
    """``[[train.validation.edits]]`` with ``source`` (a picture) and ``prompt`` (an instruction), for image-to-image:
    what to draw. Without any, ``pairs`` are drawn."""
    pairs: int = 4
    """For image-to-image without ``edits``: how many pairs of the cache to draw with their first instruction, those of
    the validation split first. 0: none."""
    every: int = 250
    """Optimizer steps between rows of pictures. 0: only before and after."""
    guidance_scale: float = 5.0
    """Classifier-free guidance. 1.0 turns it off, which takes half the time."""
    num_inference_steps: int = 50
    """Euler steps for each picture."""
    width: int | None = None
    """Width of the pictures in pixels, a multiple of 16 up to 2048. None: the cache's resolution."""
    height: int | None = None
    """Height of the pictures in pixels, as ``width``."""
    seed: int = 42
    """Seed of the pictures' noise, the same for every checkpoint, so that rows can be compared."""
    before: bool = True
    """Also draw pictures with the base model, before the first step."""
    prompt_library: str | None = None
    """A JSON file with more prompts: a list, or an object of names and prompts. The run's own recipe lists them all."""
    prompt_names: tuple[str, ...] = ()
    """Names of ``prompts``, in their order: they head the columns of grids and name the files of the pictures. "" is
    none. A ``prompt_library`` that is an object of names sets them."""
    split: float = 0.0
    """Share of the images of each cache that are held out of training, to measure the loss on them. An image that is
    held out of one cache is held out of all. 0: none."""
    held_out_every: int = 100
    """Optimizer steps between measurements of the held-out loss. 0: only before and after."""
    held_out_sigmas: int = 4
    """Number of sigmas at which each held-out row is measured, one in each equal part of 0 to 1. ``metrics.jsonl`` has
    the training loss in the same parts, with a split or without."""
    probe_images: int = 8
    """Number of images that are trained on, on which the same loss is measured at the same times: what was learned,
    beside what the held-out loss says of other images. Each measurement takes ``probe_images`` times
    ``held_out_sigmas`` forward passes more. 0: none."""
    patience: int = 0
    """Stop early if the held-out loss does not improve in this many measurements in a row. 0: never."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [] if self.prompt_library is None else path_problems("prompt_library", self.prompt_library)
        problems += [
            f"{name} must be a multiple of {SIDE_MULTIPLE} from {SIDE_MULTIPLE} to {MAX_SIDE}, found {side}"
            for name, side in (("width", self.width), ("height", self.height))
            if side is not None and not is_side(side)
        ]
        problems += self._about_names()
        if self.num_inference_steps < 1:
            problems.append(f"num_inference_steps must be at least 1, found {self.num_inference_steps}")
        if not 0 <= self.split <= 0.5:
            problems.append(f"split must be 0 to 0.5, found {self.split}")
        if self.held_out_sigmas < 1:
            problems.append(f"held_out_sigmas must be at least 1, found {self.held_out_sigmas}")
        if self.patience and not self.split:
            problems.append("patience needs rows to measure on: set split, for example split = 0.1")
        if self.patience and not self.held_out_every:
            problems.append("patience counts measurements during the run: held_out_every must be above 0")
        if not 0 <= self.guidance_scale < inf:
            problems.append(f"guidance_scale must be 0 or more, found {self.guidance_scale}")
        problems += [f"{name} must be 0 or more, found {value}" for name, value in
                     (("every", self.every), ("held_out_every", self.held_out_every), ("patience", self.patience),
                      ("pairs", self.pairs), ("probe_images", self.probe_images))
                     if value < 0]  # fmt: skip
        return problems

    def _about_names(self) -> list[str]:
        """What is wrong with ``prompt_names``."""
        names = [name for name in self.prompt_names if name]
        problems = [f"prompt_names has a name that {problem}" for name in names if (problem := name_problem(name))]
        if len({name.casefold() for name in names}) < len(names):
            problems.append("prompt_names has a name twice: files of one name would replace each other")
        if self.prompt_names and len(self.prompt_names) != len(self.prompts):
            problems.append(
                f"prompt_names has {count_of(len(self.prompt_names), 'name')} for "
                f"{count_of(len(self.prompts), 'prompt')}: give one for each,"
                ' "" for none, or leave it out'
            )
        return problems


@dataclass(frozen=True)
class TrackersConfig:
    """``[train.trackers]``: where the metrics go besides ``metrics.jsonl``, which is always written."""

    use: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Each needs the extra of that name: pip install "kandinsky5-lora[tensorboard]"."""
    project: str = "kandinsky5-lora"
    """The project under which wandb and trackio group runs."""
    offline: bool = False
    """wandb writes only into the run's folder; `wandb sync` can send it later. TensorBoard and trackio are local."""
