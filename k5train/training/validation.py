"""How good is the adapter so far? Pictures of the validation prompts and the held-out loss, when they are due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress as Bars

from k5cache.shared import interrupt
from k5cache.shared.checkpoint import read_config
from k5cache.shared.files import write_whole
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.pictures.drawings import drawings_for, draws_any
from k5train.runs.folder import Run
from k5train.runs.loss_curve import draw_losses
from k5train.runs.metrics import Metrics, read_metrics
from k5train.runs.resume_state import Progress
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.painter import Painter
from k5train.training.session import Session

if TYPE_CHECKING:
    from k5train.training.step import Predict


# Drawing loss.png takes 30 ms after 1,000 steps and 120 ms after 5,000 (two cores of a Xeon): too long for each step.
CURVE_SECONDS = 10.0


class Validation:
    """All validation of one run. It is made before the transformer is loaded, so that a missing prompt is found early.

    Raises:
        CacheError: a prompt or a pair to draw is not in the cache.
        RecipeError: guidance needs empty instructions, and the cache has none.
    """

    def __init__(self, data: Mixture, folder: Path, config: TrainConfig, run: Run) -> None:
        self.config, self.run = config.validation, run
        self._curve_drawn_at = -math.inf
        held_out = data.sources[0].split
        drawings = drawings_for(data.first, self.config, held_out) if draws_any(data.first, self.config) else []
        self.painter = Painter(drawings, folder, config, run) if drawings else None
        self.held_out_loss: HeldOutLoss | None = None
        if self.config.split:
            scaling_factor = read_config(folder, "vae")["scaling_factor"]
            self.held_out_loss = HeldOutLoss(data, self.config.held_out_sigmas, scaling_factor)

    def run_due(
        self,
        session: Session,
        predict: Predict,
        progress: Progress,
        is_last: bool,
        metrics: Metrics,
        bars: Bars,
        save_best: Callable[[], object],
    ) -> None:
        """Do what is due after ``progress.step`` updates and was not done there before. Updates ``progress``.

        Args:
            save_best: called when the held-out loss is the lowest so far.
        """
        if self.held_out_loss and _is_due("held_out", progress, self.config.held_out_every, is_last):
            self._measure(self.held_out_loss, session, predict, progress, metrics, bars, save_best)
        is_wanted = bool(progress.step) or self.config.before
        if self.painter and is_wanted and _is_due("pictures", progress, self.config.every, is_last):
            self._draw(self.painter, session, progress.step, metrics, bars)
            progress.validated["pictures"] = progress.step
        if is_last or time.monotonic() >= self._curve_drawn_at + CURVE_SECONDS:
            self._draw_curve()

    def _measure(
        self,
        held_out_loss: HeldOutLoss,
        session: Session,
        predict: Predict,
        progress: Progress,
        metrics: Metrics,
        bars: Bars,
        save_best: Callable[[], object],
    ) -> None:
        session.base.transformer.eval()
        task = bars.add_task("held-out loss", total=held_out_loss.num_passes, unit="step", note="")
        with session.settled():
            by_sigma = held_out_loss.measure(predict, session.base.device, partial(bars.advance, task))
        bars.remove_task(task)
        loss = sum(by_sigma) / len(by_sigma)
        with interrupt.deferred():  # a run that is stopped in here would measure and count once more
            metrics.write(step=progress.step, held_out_loss=loss, held_out_by_sigma=by_sigma)
            if progress.best_loss is None or loss < progress.best_loss:
                save_best()
                progress.best_loss, progress.best_step, progress.not_better = loss, progress.step, 0
            else:
                progress.not_better += 1
            progress.validated["held_out"] = progress.step

    def _draw(self, painter: Painter, session: Session, step: int, metrics: Metrics, bars: Bars) -> None:
        transformer = session.base.transformer
        with session.settled():
            metrics.pictures(step, painter.draw(transformer, step, bars))
        if session.ema and step:
            with session.ema.swapped():
                metrics.pictures(step, painter.draw(transformer, step, bars, "EMA"))

    def _draw_curve(self) -> None:
        """Bring ``loss.png`` up to date."""
        rows = read_metrics(self.run.metrics)
        if rows:
            write_whole(self.run.curve, partial(draw_losses(rows, self.run.name).save, format="PNG"))
            self._curve_drawn_at = time.monotonic()


def _is_due(kind: str, progress: Progress, every: int, is_last: bool) -> bool:
    if progress.validated.get(kind) == progress.step:
        return False
    return is_last or progress.step == 0 or bool(every and progress.step % every == 0)
