"""What does one run of the trial do? Train a LoRA on one precision, judge it and draw with it.

Whatever it was trained on, a LoRA is judged and drawn with on the weights of the checkpoint, not quantised, in float32:
as inference sees it.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from PIL import Image

from k5cache.shared import console
from k5cache.shared.errors import K5Error
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.runs.folder import Run
from pipelines.measure import judged
from pipelines.measure.precision.verdict import (
    JUDGED_ON,
    REFERENCE,
    TRIED,
    UNQUANTISED,
    Verdict,
    compared,
    distances,
)
from pipelines.measure.settings import concepts, grid
from pipelines.measure.settings.trial import MICRO, PROMPTS, RECIPE, Place, seconds_per_step

ARMS = (REFERENCE, TRIED, UNQUANTISED)
DRAWN = ValidationConfig(num_inference_steps=16, seed=7, width=128, height=128)
_FEW, _MORE = 4, 12  # steps of the runs whose kernels are counted
_KERNELS = ("_int8_matmul", "_scale_rows", "_transpose")  # of k5train/forward/kernels.py
COUNTED = (*_KERNELS, "other")


def prepare(root: Path, concept_names: tuple[str, ...] = concepts.CONCEPTS) -> Place:
    """Draw the pictures and encode them, unless that is done."""
    place = Place(root)
    pictures = root / "pictures"
    prompts = tuple(prompt for of_concept in PROMPTS.values() for prompt in of_concept)
    if not pictures.exists():
        concepts.write_known(pictures)
        for concept in concepts.CONCEPTS:
            concepts.write_folders(pictures / concept, concept)
    folders = [("", pictures / "known")]
    folders += [(concept, pictures / concept / name) for concept in concept_names for name in ("trained", "held_out")]
    for concept, folder in folders:
        cache = place.cache(concept, folder.name)
        if not (cache / "manifest.json").exists():
            judged.encode(folder, cache, RECIPE, prompts)
    return place


def config_of(arm: str, concept: str, seed: int, place: Place, device: str, steps: int) -> TrainConfig:
    """``[train]`` of a run: the centre of the trial of settings in bf16, and only ``arm`` differs between arms."""
    changes: dict[str, object] = {"base_model_precision": arm, "mixed_precision": "bf16", "device": device}
    setting = grid.Setting("precision", arm, changes, measured_at=(steps,))
    cache = place.cache(concept, "trained")
    return grid.recipe(grid.Job(setting, concept, seed), cache, cache, ())


def name_of(arm: str, concept: str, seed: int) -> str:
    """The name of a result."""
    return f"{arm}/{concept}/{seed}"


def jobs(seeds: int, concept_names: tuple[str, ...]) -> Sequence[tuple[str, str, int]]:
    """(arm, concept, seed) of all runs: both int8 precisions seed by seed, then bf16, which the rule does not need."""
    pairs = [(concept, seed) for seed in range(seeds) for concept in concept_names]
    return [*((arm, *pair) for pair in pairs for arm in (REFERENCE, TRIED)), *((UNQUANTISED, *pair) for pair in pairs)]


def do(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``work`` returns, or the problem that it met: one run that fails does not stop the others."""
    try:
        return work(*arguments)
    except (K5Error, RuntimeError, OSError) as error:
        return {"problem": f"{type(error).__name__}: {str(error)[:300]}"}


def of_base(place: Place, concept: str, device: str) -> dict[str, Any]:
    """What a run's result says, of the base alone."""
    return {"losses": _losses(place, concept, None, device), "pictures": _drawn(place, concept, None, device)}


def train_and_judge(place: Place, arm: str, concept: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    """Train a LoRA; its losses by sigma, its pictures, and what the run warned of."""
    run, said = _train(place, arm, concept, seed, device, steps)
    return {
        "losses": _losses(place, concept, run.lora, device),
        "pictures": _drawn(place, concept, run.lora, device),
        "seconds_per_step": seconds_per_step(run),
        "said": said,
    }


def count_kernels(place: Place, arm: str, device: str) -> dict[str, Any]:
    """How often the GPU runs our kernels in a step, and how often any other, whichever way the step is launched.

    From two runs of different length, after one in which kernels are checked and tuned: what is not of a step cancels.
    On a CPU all are 0.
    """
    _train(Place(place.root / "counted"), arm, concepts.CONCEPTS[0], 1, device, 1, source=place)
    counts = [_kernels_of(place, arm, device, steps) for steps in (_FEW, _MORE)]
    return {name: (counts[1][name] - counts[0][name]) / (_MORE - _FEW) for name in COUNTED}


def _kernels_of(place: Place, arm: str, device: str, steps: int) -> Counter[str]:
    from torch.profiler import ProfilerActivity, profile

    counted = Place(place.root / "counted")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:  # without, torch warns once that cycles are apart
        _train(counted, arm, concepts.CONCEPTS[0], steps, device, steps, source=place)
    counts: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            # Not a part of it: inductor names what it fuses around a matmul after it too.
            counts[event.name if event.name in _KERNELS else "other"] += 1
    return counts


def _train(
    place: Place, arm: str, concept: str, seed: int, device: str, steps: int, source: Place | None = None
) -> tuple[Run, list[str]]:
    config = config_of(arm, concept, seed, source or place, device, steps)
    run = Run(place.root / "runs" / name_of(arm, concept, seed).replace("/", "-"))
    said: list[str] = []
    with mock.patch.object(console.err, "quiet", True), mock.patch.object(console, "warn", said.append):
        judged.train_lora(run.root, (source or place).cache(concept, "trained"), replace(RECIPE, train=config))
    return run, said


def _losses(place: Place, concept: str, lora: Path | None, device: str) -> dict[str, list[float]]:
    caches = [place.cache(concept, name) for name in JUDGED_ON]
    losses = judged.held_out_losses(MICRO, lora, caches, device=device, precision=UNQUANTISED)
    return dict(zip(JUDGED_ON, losses, strict=True))


def _drawn(place: Place, concept: str, lora: Path | None, device: str) -> list[str]:
    """PNGs as text, so that a file of results has all that the verdict needs."""
    cache = place.cache(concept, "trained")
    texts = []
    for picture in judged.draw(MICRO, lora, cache, DRAWN, PROMPTS[concept], device, UNQUANTISED):
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG", optimize=True)
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def pictures_of(result: Mapping[str, Any]) -> list[Image.Image]:
    """What a result drew."""
    return [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in result["pictures"]]


def shares(results: Mapping[str, Any], arm: str, measure: str) -> dict[str, dict[int, float]]:
    """Concept -> seed -> the mean loss over the base's, of the runs that are there."""
    found: dict[str, dict[int, float]] = {}
    for name, result in results.items():
        kind, _, rest = name.partition("/")
        if kind == arm and "problem" not in result:
            concept, _, seed = rest.partition("/")
            base = mean(results[f"base/{concept}"]["losses"][measure])
            found.setdefault(concept, {})[int(seed)] = mean(result["losses"][measure]) / base
    return found


def verdict(results: Mapping[str, Any]) -> Verdict:
    """What the results say of ``TRIED`` beside ``REFERENCE``.

    Raises:
        ValueError: a concept has fewer than two seeds of both.
    """
    losses = {
        name: compared(shares(results, TRIED, measure), shares(results, REFERENCE, measure))
        for measure, name in JUDGED_ON.items()
    }
    pictures = {}
    for concept in shares(results, REFERENCE, "known"):
        values = {arm: _pixels(results, arm, concept) for arm in (REFERENCE, TRIED)}
        pictures[concept] = distances(values[TRIED], values[REFERENCE])
    return Verdict(losses, pictures)


def _pixels(results: Mapping[str, Any], arm: str, concept: str) -> dict[int, list[float]]:
    prefix = f"{arm}/{concept}/"
    return {
        int(name.removeprefix(prefix)): [v for picture in pictures_of(result) for v in picture.tobytes()]
        for name, result in results.items()
        if name.startswith(prefix) and "problem" not in result
    }
