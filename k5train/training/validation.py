"""How good is the adapter so far? Pictures of the validation prompts and losses on fixed rows, when they are due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress as Bars

from k5cache.shared import interrupt
from k5cache.shared.checkpoint import read_config
from k5cache.shared.files import write_whole
from k5train.data.mixture import Mixture
from k5train.data.split import held_out_rows, probe_rows
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks
from k5train.pictures.drawings import drawings_for, draws_any
from k5train.runs.folder import Run
from k5train.runs.loss_curve import draw_losses
from k5train.runs.loss_panels import objective_of
from k5train.runs.metrics import Metrics, read_metrics
from k5train.runs.resume_state import Progress
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.painter import Painter
from k5train.training.session import Session

if TYPE_CHECKING:
    from k5train.training.step import Predict

HELD_OUT = "held_out"
# Drawing loss.png takes 70 ms after 1,000 steps and 150 ms after 5,000 (a core of a Xeon). It waits ten seconds, and a
# hundred times as long as the last drawing took: at most a hundredth of a run's time.
CURVE_SECONDS = 10.0


class Validation:
    """All validation of one run. It is made before the transformer is loaded, so that a missing prompt is found early.

    Args:
        data: from ``split_off``.
        always_probe: measure the probe loss before the first step and after the last also without a split.
        ranks: the processes that share the work.

    Raises:
        CacheError: a prompt or a pair to draw is not in the cache.
        RecipeError: guidance needs empty instructions, and the cache has none.
    """

    def __init__(
        self, data: Mixture, folder: Path, config: TrainConfig, run: Run, always_probe: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.config, self.run, self.ranks = config.validation, run, ranks
        self._objective = objective_of(config)
        self._curve_due_at = -math.inf
        held_out = data.sources[0].split
        drawings = drawings_for(data.first, self.config, held_out) if draws_any(data.first, self.config) else []
        self.painter = Painter(drawings, folder, config, run, ranks) if drawings else None
        scaling_factor = read_config(folder, "vae")["scaling_factor"]
        of_subject, of_prior = held_out_rows(data)
        is_probed = self.config.split or always_probe
        rows = {
            HELD_OUT: of_subject,
            "held_out_prior": of_prior,
            "probe": probe_rows(data, self.config.probe_images) if is_probed else [],
        }
        self.losses = {
            name: HeldOutLoss(data, self.config.held_out_sigmas, scaling_factor, chosen)
            for name, chosen in rows.items()
            if chosen
        }
        """What is measured, by the beginning of its fields' names in metrics.jsonl."""
        self.every = self.config.held_out_every if HELD_OUT in self.losses else 0

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
            save_best: called when the held-out loss is the lowest so far, after the first step.
        """
        if self.losses and _is_due(HELD_OUT, progress, self.every, is_last):
            measured = self._measured(session, predict, progress.step, bars)
            with interrupt.deferred():  # a run that is stopped in here would measure and count once more
                metrics.write(step=progress.step, **measured)
                if HELD_OUT in self.losses:
                    _keep_the_best(measured["held_out_loss"], progress, save_best)
                progress.validated[HELD_OUT] = progress.step
        is_wanted = bool(progress.step) or self.config.before
        if self.painter and is_wanted and _is_due("pictures", progress, self.config.every, is_last):
            self.draw(session, progress, metrics, bars)
        if self.ranks.is_first and (is_last or time.monotonic() >= self._curve_due_at):
            self._draw_curve()

    def _measured(self, session: Session, predict: Predict, step: int, bars: Bars) -> dict[str, Any]:
        """The fields of a measurement: a mean loss, and the loss in each part of the noise range, of each set of rows.

        Before the first step the average is the adapter itself, so it is not measured.
        """
        session.make_room()
        session.base.transformer.eval()
        of_average = self.losses.get(HELD_OUT) if session.ema and step else None
        num_passes = sum(loss.num_passes for loss in (*self.losses.values(), of_average) if loss)
        task = bars.add_task("held-out loss" if HELD_OUT in self.losses else "probe loss", total=num_passes,
                             unit="step", note="")  # fmt: skip

        def on_step() -> None:
            self.ranks.check()
            bars.advance(task, self.ranks.size)

        arguments = predict, session.base.device, on_step, self.ranks
        measured: dict[str, Any] = {}
        with session.settled():
            for name, loss in self.losses.items():
                measured |= {**_fields(name, loss.measure(*arguments)), f"{name}_key": loss.key}
        if session.ema and of_average:
            with session.ema.swapped():
                measured |= _fields("ema_held_out", of_average.measure(*arguments))
        bars.remove_task(task)
        return measured

    def draw(self, session: Session, progress: Progress, metrics: Metrics, bars: Bars) -> bool:
        """Draw the pictures of this step, unless they are drawn.

        Returns:
            False if the recipe has no prompts and no pairs.
        """
        transformer, step = session.base.transformer, progress.step
        if self.painter is None:
            return False
        if progress.validated.get("pictures") != step:
            session.make_room()
            with session.settled():
                metrics.pictures(step, self.painter.draw(transformer, step, bars))
            if session.ema and step:
                with session.ema.swapped():
                    metrics.pictures(step, self.painter.draw(transformer, step, bars, "EMA"))
            progress.validated["pictures"] = step
        return True

    def _draw_curve(self) -> None:
        """Bring ``loss.png`` up to date."""
        began = time.monotonic()
        rows = read_metrics(self.run.metrics)
        if rows:
            picture = draw_losses(rows, self.run.name, self._objective)
            write_whole(self.run.curve, partial(picture.save, format="PNG", compress_level=1))
            ended = time.monotonic()
            self._curve_due_at = ended + max(CURVE_SECONDS, 100 * (ended - began))


def _fields(name: str, by_sigma: list[float]) -> dict[str, Any]:
    """NaN and infinity become None within a list, as ``Metrics.write`` does outside."""
    finite = [loss if math.isfinite(loss) else None for loss in by_sigma]
    return {f"{name}_loss": sum(by_sigma) / len(by_sigma), f"{name}_by_sigma": finite}


def _keep_the_best(loss: float, progress: Progress, save_best: Callable[[], object]) -> None:
    best = progress.best_loss
    # A run of an earlier version may have NaN for its best, and nothing is below that.
    if math.isfinite(loss) and (best is None or not best <= loss):
        if progress.step:  # before the first one nothing is trained: a file of it would be taken for a LoRA
            save_best()
        progress.best_loss, progress.best_step, progress.not_better = loss, progress.step, 0
    else:
        progress.not_better += 1


def _is_due(kind: str, progress: Progress, every: int, is_last: bool) -> bool:
    if progress.validated.get(kind) == progress.step:
        return False
    return is_last or progress.step == 0 or bool(every and progress.step % every == 0)
