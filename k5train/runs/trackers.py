"""Where is a run shown besides its files? TensorBoard, wandb and trackio, each imported only if the recipe names it.

We do not use ``accelerate.tracking`` (read in 1.15): its classes would save the calls in ``log`` and ``close``. What is
left is ours in any case: purging the TensorBoard steps that a crash undid, the id by which a resumed run finds its
wandb run, a step axis that takes repeated steps, an error that says what to do about a missing key, and keeping
trackio's token out of logs. Its TensorBoard tracker also flushes after every step, and its trackio tracker takes no
pictures.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import RunError
from k5train.options.validation import TrackersConfig
from k5train.runs.folder import Run

if TYPE_CHECKING:
    from PIL import Image


class Tracker(Protocol):
    """What ``Metrics`` calls."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show the numbers of one step, by name."""

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Show the pictures of one step, by caption."""

    def close(self) -> None:
        """The run has ended or stopped."""


def check_trackers(config: TrackersConfig) -> None:
    """Refuse a tracker that is not installed, before anything is loaded.

    Raises:
        RunError: a tracker is missing; says what to install.
    """
    for name in config.use:
        if importlib.util.find_spec(name) is None:
            raise RunError(
                f"train.trackers names {name}, which is not installed", f'Run: pip install "kandinsky5-lora[{name}]"'
            )


def open_trackers(config: TrackersConfig, run: Run, recipe: dict[str, Any], step: int) -> list[Tracker]:
    """Start every tracker that the recipe names, or continue where it was.

    Args:
        recipe: what they show as the run's settings.
        step: updates done before this start. What a tracker shows beyond it was undone by a crash.
    """
    trackers: list[Tracker] = []
    for name in config.use:
        match name:
            case "tensorboard":
                trackers.append(_TensorBoard(run, step))
            case "wandb":
                trackers.append(_Wandb(config, run, recipe))
            case "trackio":
                trackers.append(_Trackio(config, run, recipe))
    return trackers


class _TensorBoard:
    """Event files in ``runs/<name>/tensorboard``. To see them: `tensorboard --logdir runs`."""

    def __init__(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.root / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        import numpy as np

        for name, picture in pictures.items():
            pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One wandb run with the run's name. A resumed run continues it, found by the id in ``wandb/id``."""

    def __init__(self, config: TrackersConfig, run: Run, recipe: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        id_file = run.root / "wandb" / "id"
        run_id = id_file.read_text(encoding="utf-8") if id_file.exists() else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=config.project, name=run.name, id=run_id, resume="allow",
                dir=str(run.root), config=recipe, mode="offline" if config.offline else None,
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:  # no key, a wrong key, or no network
            raise RunError(
                f"wandb does not start: {without_credentials(str(error).splitlines()[0])}",
                "Run: wandb login, or keep it on this machine: --set train.trackers.offline=true",
            ) from error
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(run_id, encoding="utf-8")
        # After a crash the run repeats steps that wandb has already seen. wandb's own step would drop them, so the
        # curves have a step of ours.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        self._run.log({"step": step, **{name: self._wandb.Image(p) for name, p in pictures.items()}})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A local trackio project. To see it: `trackio show --project kandinsky5-lora`."""

    def __init__(self, config: TrackersConfig, run: Run, recipe: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        self._run = _silently(
            lambda: trackio.init(
                project=config.project,
                name=run.name,
                resume="allow",
                config=recipe,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        self._run.log({name: self._trackio.Image(p) for name, p in pictures.items()}, step=step)

    def close(self) -> None:
        _silently(self._trackio.finish)


def _silently(call: Callable[[], Any]) -> Any:
    """Call without output: trackio prints, among other things, a token that allows writing."""
    with Path(os.devnull).open("w") as devnull, redirect_stdout(devnull):
        return call()
