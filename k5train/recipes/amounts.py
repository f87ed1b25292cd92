"""How many steps are usual for how many images, and what follows from that? Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from k5train.recipes.answers import Answers, Goal

PER_ROOT_OF_IMAGES: Mapping[Goal, int] = {"style": 110, "object": 150, "character": 180, "edit": 200}
"""Steps over the root of the number of images. Common practice: 500 to 1,000 for 20 images, 2,000 to 4,000 for 300."""
MANY = 1000
"""From here on an update averages several rows, and fewer of them are needed."""
ROWS_OF_MANY = 4
SHOWN = (20, 50, 100, 300, 1000, 3000, 10000)
"""The numbers of images that a recipe shows steps for."""
_LEAST_STEPS = 200
_PARTS = 8


def rows_of_update(num_images: int) -> int:
    """Rows that one update averages."""
    return ROWS_OF_MANY if num_images >= MANY else 1


def usual_steps(goal: Goal, num_images: int, num_rows: int = 1) -> int:
    """Optimizer updates, in hundreds.

    Four times the images take twice the steps, and so does a fourth of the rows of an update: on k5-micro 200 steps of
    4 rows came to what 400 steps of 1 row did (docs/settings.md).
    """
    return max(_LEAST_STEPS, 100 * round(PER_ROOT_OF_IMAGES[goal] * sqrt(num_images / num_rows) / 100))


def between_looks(num_steps: int) -> int:
    """Steps between saved LoRAs, pictures and measurements: about eight of each in a run."""
    return max(50, 50 * round(num_steps / _PARTS / 50))


def split_for(num_images: int) -> float:
    """The share of the images that is held out: enough to measure on, and no more."""
    for least, share in ((1000, 0.02), (200, 0.05), (20, 0.1)):
        if num_images >= least:
            return share
    return 0.0


def rank_for(answers: Answers) -> int:
    """A rank that the goal needs and the card has room for."""
    if answers.gigabytes is not None and answers.gigabytes < 10:
        return 16
    if answers.num_images >= MANY and (answers.gigabytes or 0) >= 16:
        return 64
    return 32
