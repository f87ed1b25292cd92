"""TensorBoard, wandb and trackio: where a run is also shown. None is imported before a recipe names it."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from k5cache.shared.errors import RunError
from k5train.options.validation import TrackersConfig
from k5train.runs.folder import Run

if TYPE_CHECKING:
    from PIL import Image


class Tracker(Protocol):
    """What the loop tells each of them."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one step by name."""

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Pictures of one step by caption."""

    def close(self) -> None:
        """The run ends, or stops for now."""


def check_trackers(config: TrackersConfig) -> None:
    """Refuse a tracker that is not installed, before anything is loaded.

    Raises:
        RunError: one is missing; says what to install.
    """
    for name in config.use:
        if importlib.util.find_spec(name) is None:
            raise RunError(
                f"train.trackers names {name}, which is not installed", f'Run: pip install "kandinsky5-lora[{name}]"'
            )


def open_trackers(config: TrackersConfig, run: Run, recipe: dict[str, Any], step: int) -> list[Tracker]:
    """Start, or take up again, every tracker that the recipe names.

    Args:
        recipe: what they show as the run's settings.
        step: updates that the run goes on from.
    """
    make: dict[str, Callable[[TrackersConfig, Run, dict[str, Any], int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "trackio": _Trackio,
    }
    return [make[name](config, run, recipe, step) for name in config.use]


class _TensorBoard:
    """Event files in ``runs/<name>/tensorboard``: `tensorboard --logdir runs`."""

    def __init__(self, config: TrackersConfig, run: Run, recipe: dict[str, Any], step: int) -> None:
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
    """One wandb run under the run's own name; taken up again when the run is."""

    def __init__(self, config: TrackersConfig, run: Run, recipe: dict[str, Any], step: int) -> None:
        import wandb

        self._wandb = wandb
        path = run.root / "wandb" / "id"
        identity = path.read_text(encoding="utf-8") if path.exists() else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=config.project, name=run.name, id=identity, resume="allow",
                dir=str(run.root), config=recipe, mode="offline" if config.offline else None,
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:  # no key, a wrong one, or no network
            raise RunError(
                f"wandb does not start: {str(error).splitlines()[0]}",
                "Run: wandb login, or keep it on this machine: --set train.trackers.offline=true",
            ) from error
        path.parent.mkdir(exist_ok=True)
        path.write_text(identity, encoding="utf-8")
        # After a crash steps come again that wandb has seen: an axis of our own takes them, wandb's would drop them.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        self._run.log({"step": step, **{name: self._wandb.Image(p) for name, p in pictures.items()}})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A local trackio project: `trackio show --project kandinsky5-lora`."""

    def __init__(self, config: TrackersConfig, run: Run, recipe: dict[str, Any], step: int) -> None:
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
    """trackio prints what it does, sometimes with a token that allows writing: keep that out of logs."""
    from contextlib import redirect_stdout

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
        return call()
