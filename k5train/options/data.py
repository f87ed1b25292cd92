"""``[[train.data]]``: the options of a cache that a run trains on. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from k5cache.shared.model import path_problems


@dataclass(frozen=True)
class DataConfig:
    """``[[train.data]]``: one of the caches that a run trains on."""

    cache: str
    """A folder made by ``k5cache encode``."""
    weight: float | None = None
    """Share of the rows of an epoch that come from this cache, relative to the weights of the other entries. None: in
    proportion to its size."""
    repeats: int = 1
    """How often each of its images is used in one epoch."""
    repeats_by_folder: bool = False
    """As ``train.repeats_by_folder``."""
    is_regularisation_data: bool = False
    """Whether the images show the class and not the subject: their errors are multiplied by ``prior_loss_weight``."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = path_problems("cache", self.cache)
        if self.weight is not None and not 0 < self.weight < inf:
            problems.append(f"weight must be above 0, found {self.weight}")
        if self.repeats < 1:
            problems.append(f"repeats must be at least 1, found {self.repeats}")
        return problems
