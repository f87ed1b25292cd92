"""How good the adapter is so far: pictures of the validation prompts and the held-out loss, when they are due."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from k5cache.shared.checkpoint import read_config
from k5cache.shared.files import write_whole
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.runs.folder import Run
from k5train.runs.loss_curve import draw_losses
from k5train.runs.metrics import Metrics, read_metrics
from k5train.runs.resume_state import Progress as Done
from k5train.training.held_out_loss import HeldOut
from k5train.training.painter import Painter
from k5train.training.session import Session

if TYPE_CHECKING:
    from k5train.training.step import Predict


class Validation:
    """All validation of one run. Made before anything is loaded, so that a missing prompt is found at once.

    Raises:
        CacheError: a prompt is not in the cache.
    """

    def __init__(self, data: Mixture, folder: Path, config: TrainConfig, run: Run) -> None:
        chosen = config.validation
        self.config, self.run = chosen, run
        self.painter = Painter(data, folder, config, run) if chosen.prompts else None
        scaling_factor = read_config(folder, "vae")["scaling_factor"]
        self.held_out = HeldOut(data, chosen.held_out_sigmas, scaling_factor) if chosen.split else None

    def run_due(
        self,
        session: Session,
        predict: Predict,
        done: Done,
        is_last: bool,
        metrics: Metrics,
        bars: Progress,
        save_best: Callable[[], object],
    ) -> None:
        """Whatever is due after ``done.step`` updates and was not finished there before; ``done`` is told.

        Args:
            save_best: called when the held-out loss is the lowest so far.
        """
        chosen = self.config
        if self.held_out and _is_due("held_out", done, chosen.held_out_every, is_last):
            session.base.transformer.eval()
            task = bars.add_task("held-out loss", total=len(self.held_out.rows) * self.held_out.num_sigmas,
                                 unit="step", note="")  # fmt: skip
            with session.settled():
                by_sigma = self.held_out.measure(predict, session.base.device, partial(bars.advance, task))
            bars.remove_task(task)
            loss = sum(by_sigma) / len(by_sigma)
            metrics.write(step=done.step, held_out_loss=loss, held_out_by_sigma=by_sigma)
            if done.best_loss is None or loss < done.best_loss:
                save_best()
                done.best_loss, done.best_step, done.not_better = loss, done.step, 0
            else:
                done.not_better += 1
            done.validated["held_out"] = done.step
        pictures_due = _is_due("pictures", done, chosen.every, is_last) and (done.step or chosen.before)
        if self.painter and pictures_due:
            with session.settled():
                metrics.pictures(done.step, self.painter.draw(session.base.transformer, done.step, bars))
            if session.ema and done.step:
                with session.ema.swapped():
                    metrics.pictures(done.step, self.painter.draw(session.base.transformer, done.step, bars, "EMA"))
            done.validated["pictures"] = done.step
        self.draw_curve()

    def draw_curve(self) -> None:
        """Bring ``loss.png`` up to date."""
        rows = read_metrics(self.run.metrics)
        if rows:
            write_whole(self.run.curve, partial(draw_losses(rows, self.run.name).save, format="PNG"))


def _is_due(kind: str, done: Done, every: int, is_last: bool) -> bool:
    if done.validated.get(kind) == done.step:
        return False
    return is_last or done.step == 0 or bool(every and done.step % every == 0)
