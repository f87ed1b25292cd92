"""How good the adapter is so far: pictures of the validation prompts and the held-out loss, when they are due."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.progress import Progress

from k5cache.hub import read_config
from k5train import sample
from k5train.checkpoint import Run, write_json, write_whole
from k5train.config import TrainConfig
from k5train.curve import draw_losses
from k5train.heldout import HeldOut
from k5train.metrics import Metrics, read_metrics
from k5train.mixture import Mixture
from k5train.session import Session
from k5train.state import Progress as Done

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5train.step import Predict


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


class Painter:
    """Draws the validation prompts at a step and keeps the run's grid up to date.

    Raises:
        CacheError: a prompt is not in the cache: found before anything is loaded.
    """

    def __init__(self, data: Mixture, folder: Path, config: TrainConfig, run: Run) -> None:
        chosen, cache = config.validation, data.first
        self.folder, self.run, self.prompts = folder, run, chosen.prompts
        self.rows, self.negative = sample.prompt_rows(cache, chosen.prompts, chosen.negative_prompt)
        self.settings = sample.settings_for(cache, chosen)
        self.drawn = {"prompts": list(self.prompts), "negative_prompt": chosen.negative_prompt, **asdict(self.settings)}

    def draw(
        self, transformer: Kandinsky5Transformer3DModel, step: int, bars: Progress, kind: str = ""
    ) -> dict[str, Image.Image]:
        """Sample every prompt with the transformer as it is now, decode, and write pictures and grid.

        Before the first step that is the base model, without its adapter: the row that all others stand beside.

        Args:
            kind: a further row of the same step, such as ``EMA``.

        Returns:
            the pictures by what they show.
        """
        transformer.eval()
        folder = self.run.samples(step) / kind.lower()
        if step == 0 and self._is_drawn(folder):  # a sweep brings the base model's pictures along
            pictures = self._read(folder)
        else:
            with _without_adapter(transformer) if step == 0 else nullcontext():
                pictures = sample.draw_prompts(
                    transformer, self.folder, self.rows, self.negative, self.settings, bars, f"sampling at step {step}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(pictures):
                write_whole(folder / f"{i:02d}.png", partial(picture.save, format="PNG"))
            write_json(folder / "drawn.json", self.drawn)
        self.write_grid(step)
        ending = f" ({kind})" if kind else ""
        return {f"{prompt}{ending}": picture for prompt, picture in zip(self.prompts, pictures, strict=True)}

    def write_grid(self, step: int) -> None:
        """Every row drawn so until ``step``, from the files: also those of before a restart."""
        rows = []
        for number in sorted(int(p.name.removeprefix("step-")) for p in self.run.root.glob("samples/step-*")):
            for kind in ("", "EMA"):
                folder = self.run.samples(number) / kind.lower()
                if number <= step and self._is_drawn(folder):
                    label = f"step {number} {kind}".strip() if number else "base model"
                    rows.append((label, self._read(folder)))
        write_whole(self.run.grid, partial(sample.grid(rows, self.prompts).save, format="PNG"))

    def _is_drawn(self, folder: Path) -> bool:
        """Whether these prompts were drawn there, in this way."""
        try:
            return bool(json.loads((folder / "drawn.json").read_text(encoding="utf-8")) == self.drawn)
        except FileNotFoundError:
            return False

    def _read(self, folder: Path) -> list[Image.Image]:
        return [Image.open(folder / f"{i:02d}.png").convert("RGB") for i in range(len(self.prompts))]


@contextmanager
def _without_adapter(transformer: Kandinsky5Transformer3DModel) -> Iterator[None]:
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
