"""What does one run of the trial do? Train, measure, and say what it learned, what it forgot and what it took."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.errors import K5Error
from k5cache.shared.model import ModelConfig
from k5train.options.train import TrainConfig
from k5train.runs.folder import Run
from k5train.runs.metrics import read_metrics
from pipelines.measure import judged
from pipelines.measure.settings import concepts
from pipelines.measure.settings.grid import Job, Setting, jobs, recipe

MICRO = concepts.DEMO / "k5-micro"
RECIPE = judged.Recipe(
    ModelConfig(path=str(MICRO)),
    CacheConfig(resolution=128, text_encoder_1_precision="fp32", text_encoder_2_precision="fp32", vae_precision="fp32"),
    TrainConfig(),
)
MEASURED_ON = ("held_out", "unnamed", "known")
PROMPTS = {
    "lines": ("rocket, red ink line drawing style, white background", "rocket, shaded emoji style, white background"),
    "mosaic": ("panda, tile mosaic style, white background", "panda, flat emoji style, white background"),
    "creature": (
        f"{concepts.TRIGGER} monster waving, flat emoji style, white background",
        "monster waving, flat emoji style, white background",
        "red apple, flat emoji style, white background",
    ),
}
"""What is drawn of each concept: a thing that was not trained on, and the same without the concept's words."""


@dataclass(frozen=True)
class Place:
    """Where the trial works."""

    root: Path

    def cache(self, concept: str, name: str) -> Path:
        """The cache of one of a concept's folders; ``known`` and ``class`` are shared by all concepts."""
        return self.root / "caches" / (name if name in ("known", "class") else f"{concept}-{name}")

    def run(self, job: Job) -> Path:
        """The folder of a run."""
        return self.root / "runs" / job.key.replace("/", "-").replace(" ", "-")


@dataclass(frozen=True)
class Task:
    """What a process is given: a run to make, or the base to measure, and where."""

    place: Place
    concept: str
    job: Job | None
    """None: the base."""


def prepare(root: Path) -> Place:
    """Draw all pictures and encode them, each folder once."""
    place, pictures = Place(root), root / "pictures"
    folders = [("", folder) for folder in concepts.write_known(pictures)]
    for concept in concepts.CONCEPTS:
        folders += [(concept, folder) for folder in concepts.write_folders(pictures / concept, concept)]
    prompts = tuple(prompt for of_concept in PROMPTS.values() for prompt in of_concept)
    for concept, folder in folders:
        judged.encode(folder, place.cache(concept, folder.name), RECIPE, prompts)
    return place


def tasks(place: Place, seeds: int, settings: Sequence[Setting]) -> dict[str, Task]:
    """All runs in order, after the base, each with its name in the results."""
    base = {f"base/{concept}": Task(place, concept, None) for concept in concepts.CONCEPTS}
    return base | {job.key: Task(place, job.concept, job) for job in jobs(seeds, settings)}


def losses(place: Place, concept: str, lora: Path | None) -> dict[str, list[float]]:
    """Held-out losses, by noise level, on what the concept is judged by."""
    caches = [place.cache(concept, name) for name in MEASURED_ON]
    return dict(zip(MEASURED_ON, judged.held_out_losses(MICRO, lora, caches), strict=True))


def make(task: Task) -> dict[str, Any]:
    """Train one run and measure it; or measure the base, as step 0."""
    place, job = task.place, task.job
    if job is None:
        return {"measured": {"0": losses(place, task.concept, None)}}
    trained = place.cache(job.concept, "trained")
    config = recipe(job, trained, place.cache("", "class"), PROMPTS[job.concept])
    run = Run(place.run(job))
    try:
        with mock.patch.object(console.err, "quiet", True):  # of a hundred runs, every tenth step would be shown
            # If the recipe names several caches, there is none to give.
            judged.train_lora(run.root, None if config.data else trained, replace(RECIPE, train=config))
    except K5Error as error:  # such as a loss that explodes
        return {"error": error.problem, "measured": {}}
    files = {str(step): run.checkpoint(step) for step in job.setting.measured_at}
    if config.optim.ema_decay:
        files["ema"] = run.ema
    return {
        "seconds_per_step": seconds_per_step(run),
        "measured": {step: losses(place, job.concept, file) for step, file in files.items()},
    }


def seconds_per_step(run: Run) -> float:
    """The median, as other processes and checkpoints make single steps longer."""
    return statistics.median(row["seconds"] for row in read_metrics(run.metrics) if "loss" in row)


def machine() -> dict[str, Any]:
    """What the trial was made on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": (names or [platform.processor()])[0], "cores": os.cpu_count(), "torch": torch.__version__}
