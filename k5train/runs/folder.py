"""The folder of a run: what is in it, who may write it, and how each file gets there whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from k5cache.shared.errors import K5Error, RunError
from k5cache.shared.files import write_json, write_whole
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read, to_dict, to_toml
from k5train.options.train import TrainConfig


@dataclass(frozen=True)
class Run:
    """``runs/<name>``: recipe.toml, run.json, metrics.jsonl, checkpoints/, state/, samples/, pictures, the LoRA."""

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

    @property
    def state(self) -> Path:
        """What `k5train resume` goes on from."""
        return self.root / "state"

    @property
    def result(self) -> Path:
        """Written last: how the run ended. Without it the run is not finished."""
        return self.root / "result.json"

    @property
    def best(self) -> Path:
        """The LoRA with the lowest held-out loss."""
        return self.root / f"{self.name}-best.safetensors"

    @property
    def ema(self) -> Path:
        """The averaged LoRA, where the recipe keeps one."""
        return self.root / f"{self.name}-ema.safetensors"

    @property
    def curve(self) -> Path:
        """The losses as a picture."""
        return self.root / "loss.png"

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.result.is_file()

    def checkpoints(self) -> dict[int, Path]:
        """The saved LoRAs by step, in order."""
        found = {int(p.stem.removeprefix("step-")): p for p in (self.root / "checkpoints").glob("step-*.safetensors")
                 if p.stem.removeprefix("step-").isdigit()}  # fmt: skip
        return dict(sorted(found.items()))

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
    if root.exists() and any(p.name not in _EMPTY for p in root.iterdir()):
        raise RunError(f"{root} already holds a run", "Give another folder with -o, or another --set train.name=NAME")
    for folder in (root, root / "checkpoints", root / "samples"):
        folder.mkdir(parents=True, exist_ok=True)
    write_recipe(root, model, config)
    names = ("kandinsky5-lora", "torch", "diffusers", "peft", "optimum-quanto")
    facts = {"cache": str(cache), "versions": {name: version(name) for name in names}}
    write_json(root / "run.json", facts)
    return Run(root)


@contextmanager
def undone_if_refused(run: Run) -> Iterator[Run]:
    """``with undone_if_refused(create_run(...)) as run: train(...)``: what is refused at its start leaves nothing.

    The command that was mended then has the folder's name to itself. Only what ``create_run`` and ``hold`` wrote goes.
    """
    try:
        yield run
    except K5Error:
        folders = [run.root / name for name in ("checkpoints", "samples")]
        ours = {*folders, *(run.root / name for name in ("recipe.toml", "run.json", ".lock"))}
        is_bare = set(run.root.iterdir()) <= ours and not any(any(folder.iterdir()) for folder in folders)
        if is_bare and not is_held(run):  # by another process, which was faster
            for path in ours:
                path.rmdir() if path in folders else path.unlink(missing_ok=True)
            run.root.rmdir()
        raise


# What is there before run.json, which makes a folder a run: a kill in between leaves nothing to keep.
_EMPTY = ("recipe.toml", "checkpoints", "samples")


def write_recipe(root: Path, model: ModelConfig, config: TrainConfig) -> None:
    """Put a run's recipe, with every option, in place."""
    text = to_toml({"model": to_dict(model), "train": to_dict(config)})
    write_whole(root / "recipe.toml", lambda path: path.write_text(text, encoding="utf-8"))


@contextmanager
def hold(run: Run) -> Iterator[None]:
    """Be the only process that trains this run. The kernel lets go when the process ends, however it ends.

    Raises:
        RunError: another process trains it.
    """
    fd = os.open(run.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise RunError(
                f"{run.root} is being trained by process {pid}", "Wait for it, or start another with -o"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def is_held(run: Run) -> bool:
    """Whether a process trains this run right now."""
    try:
        with hold(run):
            return False
    except RunError:
        return True


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
