"""The folder of a run: what is in it and how each file gets there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from k5cache.config import ModelConfig
from k5cache.errors import RunError
from k5cache.recipe import parse, read, to_dict, to_toml
from k5train.config import TrainConfig


@dataclass(frozen=True)
class Run:
    """``runs/<name>``: recipe.toml, run.json, metrics.jsonl, checkpoints/, samples/, samples.png, the LoRA."""

    root: Path

    @property
    def name(self) -> str:
        """The run's own name, also its LoRA's."""
        return self.root.name

    @property
    def lora(self) -> Path:
        """The finished LoRA."""
        return self.root / f"{self.name}.safetensors"

    @property
    def grid(self) -> Path:
        """Every sampled checkpoint under the next, one column a prompt."""
        return self.root / "samples.png"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The LoRA after ``step`` updates."""
        return self.root / "checkpoints" / f"step-{step:06d}.safetensors"

    def samples(self, step: int) -> Path:
        """Folder of the pictures drawn after ``step`` updates."""
        return self.root / "samples" / f"step-{step:06d}"


def create_run(root: Path, cache: Path, model: ModelConfig, config: TrainConfig) -> Run:
    """Make a new run's folder, with its recipe as resolved.

    Raises:
        RunError: there is already something at ``root``.
    """
    if root.exists() and any(root.iterdir()):
        raise RunError(f"{root} already holds a run", "Give another folder with -o, or another --set train.name=NAME")
    for folder in (root, root / "checkpoints", root / "samples"):
        folder.mkdir(parents=True, exist_ok=True)
    text = to_toml({"model": to_dict(model), "train": to_dict(config)})
    write_whole(root / "recipe.toml", lambda path: path.write_text(text, encoding="utf-8"))
    names = ("kandinsky5-lora", "torch", "diffusers", "peft", "optimum-quanto")
    facts = {"cache": str(cache), "versions": {name: version(name) for name in names}}
    write_whole(root / "run.json", lambda path: path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8"))
    return Run(root)


def open_run(root: Path) -> tuple[Run, ModelConfig, TrainConfig, Path]:
    """An existing run, its configs and its cache's path.

    Raises:
        RunError: ``root`` is not a run.
    """
    recipe, facts = root / "recipe.toml", root / "run.json"
    if not recipe.is_file() or not facts.is_file():
        raise RunError(
            f"{root} is not a run: it has no recipe.toml and run.json", "Give a folder made by `k5train run`"
        )
    model, config = parse(read(recipe, []), {"model": ModelConfig, "train": TrainConfig}, recipe)
    try:
        cache = Path(json.loads(facts.read_text(encoding="utf-8"))["cache"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{facts} cannot be read", "Train again, or mend the file: it names the cache") from error
    return Run(root), model, config, cache


def free_name(runs: Path, name: str) -> Path:
    """``runs/name``, or ``runs/name-2``, ``-3`` ... where that is taken: no run is ever written over."""
    candidate, number = runs / name, 2
    while candidate.exists():
        candidate, number = runs / f"{name}-{number}", number + 1
    return candidate


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place at once."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
