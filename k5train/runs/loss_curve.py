"""The picture of a run's losses over its steps: ``loss.png``, made of ``metrics.jsonl`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from k5train.runs.chart import WIDTH, draw_chart
from k5train.runs.loss_panels import loss_rows, summary

if TYPE_CHECKING:
    from PIL import Image


def draw_losses(rows: Sequence[dict[str, Any]], title: str, objective: str = "") -> Image.Image:
    """``loss_rows`` as a picture.

    Args:
        objective: from ``objective_of``, shown over the training loss.
    """
    return draw_chart(title, loss_rows(rows, objective), summary(rows), WIDTH)
