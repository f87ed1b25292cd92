"""What is in the folder of a run, and which process may write it?"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath

from k5cache.shared import console, files, interrupt, outputs
from k5cache.shared.errors import K5Error, OutputError, RunError
from k5cache.shared.files import make_folder
from k5cache.shared.inside import MOST_NAME_BYTES, check_inside
from k5cache.shared.lock import Locked, is_lock, lock_file
from k5cache.shared.model import ModelConfig
from k5cache.shared.plain import read_json
from k5cache.shared.recipe import parse
from k5train.options.train import TrainConfig
from k5train.runs.recipe import FACTS, cache_of, read_facts, read_recipe, write_new

# A folder is a run once it has recipe.toml, which is written last. If it has only these, a kill came before that. A
# recipe.toml of the user, alone in a folder, is not among them.
_BEFORE_RECIPE = re.compile(r"run\.json|checkpoints|samples|\.lock|\.\d+-(recipe\.toml|run\.json)")

LOCK = ".lock"
REQUESTS = {"save": "save.request", "sample": "sample.request"}
"""Files by which a run is asked for something between two steps (``requests.py``)."""


@dataclass(frozen=True)
class Run:
    """The paths in ``runs/<name>``."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name, as which its LoRAs are called."""
        return name_of(self.root)

    @property
    def stem(self) -> str:
        """What its LoRAs are called: as the run, unless its folder was renamed after some were written."""
        for name in (self.name, *_earlier_names(self.root)):
            if any((self.root / f"{name}{ending}.safetensors").is_file() for ending in ("", "-best", "-ema")):
                return name
        return self.name

    @property
    def lora(self) -> Path:
        """The finished LoRA."""
        return self.root / f"{self.stem}.safetensors"

    @property
    def grid(self) -> Path:
        """The picture grid: a row for each step at which pictures were drawn, a column for each prompt."""
        return self.root / "samples.png"

    @property
    def metrics(self) -> Path:
        """One JSON line for each step."""
        return self.root / "metrics.jsonl"

    @property
    def state(self) -> Path:
        """The state that `k5train resume` starts from."""
        return self.root / "state"

    @property
    def result(self) -> Path:
        """How the run ended. It is written last: without it the run is not finished."""
        return self.root / "result.json"

    @property
    def best(self) -> Path:
        """The LoRA with the lowest held-out loss."""
        return self.root / f"{self.stem}-best.safetensors"

    @property
    def ema(self) -> Path:
        """The averaged LoRA, if the recipe has ``ema_decay``."""
        return self.root / f"{self.stem}-ema.safetensors"

    @property
    def curve(self) -> Path:
        """The picture of the losses."""
        return self.root / "loss.png"

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended."""
        return self.result.is_file()

    def keep(self) -> None:
        """Let ``new_run`` not remove it though it has done nothing yet: a message names it in a command."""
        if not self.state.exists():
            self.metrics.touch()

    def check_there(self) -> None:
        """Refuse to begin a second folder in the place of one that was moved while it was trained.

        Raises:
            FileNotFoundError: it was moved.
        """
        os.stat(self.root / "run.json")  # noqa: PTH116 (only for its error, which names the file)

    def checkpoints(self) -> dict[int, Path]:
        """Step -> the LoRA saved then, in order."""
        paths = (self.root / "checkpoints").glob("step-*.safetensors")
        by_step = {int(path.stem[5:]): path for path in paths if path.stem[5:].isdigit()}
        return {step: path for step, path in sorted(by_step.items()) if path == self.checkpoint(step)}

    def checkpoint(self, step: int) -> Path:
        """The LoRA after ``step`` updates."""
        return self.root / "checkpoints" / f"step-{step:06d}.safetensors"

    def samples(self, step: int) -> Path:
        """The folder of the pictures drawn after ``step`` updates."""
        return self.root / "samples" / f"step-{step:06d}"


def name_of(root: Path) -> str:
    """The name of the run in a folder, also if the folder was given as ``.`` or ``..``."""
    return root.name if root.name not in ("", "..") else root.resolve().name


def _earlier_names(root: Path) -> Iterator[str]:
    """What the run in a folder was called when it started, and when it ended. Nothing that cannot be read."""
    with suppress(RunError, OSError, ValueError, KeyError, TypeError, AttributeError):
        yield _file_name(tomllib.loads(read_facts(root).recipe or "")["train"]["name"])
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        yield PurePath(_file_name(read_json(root / "result.json")["lora"])).stem


def _file_name(name: str) -> str:
    if PurePath(name).name != name or "\0" in name:
        raise ValueError(f"{name} is not the name of a file")
    return name


def check_new(root: Path) -> None:
    """Refuse a folder in which a new run would overwrite files or be mixed up with others. Writes nothing.

    Raises:
        RunError: there is already a run at ``root``.
        OutputError: ``root`` holds something else, has a name that is too long, or cannot be written.
    """
    check_inside(root)
    outputs.check_folder(root, "run", _is_unfinished)
    if len(os.fsencode(name_of(root))) > MOST_NAME_BYTES:  # the names of its LoRAs are longer still
        raise OutputError(
            f"The name of the run folder {root} has more than {MOST_NAME_BYTES} bytes", "Choose a shorter one with -o"
        )
    if outputs.kind_of(root) == "run":
        raise RunError(f"{root} already holds a run", "Give another folder with -o")
    outputs.check_writable(root)


def _is_unfinished(root: Path) -> bool:
    """Whether a folder holds only what ``create_run`` leaves if it is killed."""
    entries = [entry for entry in root.iterdir() if not outputs.HARMLESS.fullmatch(entry.name)]
    if not all(_BEFORE_RECIPE.fullmatch(entry.name) for entry in entries):
        return False
    if any(any(entry.iterdir()) for entry in entries if entry.name in ("checkpoints", "samples") and entry.is_dir()):
        return False
    try:
        are_facts = all(set(read_json(e)) >= {*FACTS} for e in entries if e.name == "run.json")
        return are_facts and all(is_lock(e) for e in entries if e.name == LOCK)
    except (OSError, ValueError, TypeError):
        return False


def create_run(root: Path, cache: Path, model: ModelConfig, config: TrainConfig) -> Run:
    """Make the folder of a new run and write its recipe with every option in it.

    Raises:
        RunError, OutputError: as ``check_new``, or another process is making a run there.
    """
    check_new(root)
    make_folder(root)
    with lock_run(Run(root)):
        check_new(root)  # another process, perhaps of another machine, may have made it meanwhile
        for name in ("checkpoints", "samples"):
            make_folder(root / name)
        names = ("kandinsky5-lora", "torch", "diffusers", "peft", "optimum-quanto")
        write_new(root, cache, {name: version(name) for name in names}, model, config)
    return Run(root)


@contextmanager
def new_run(root: Path, cache: Path, model: ModelConfig, config: TrainConfig) -> Iterator[Run]:
    """``create_run``, undone if the run is refused or stopped at its start: ``with new_run(...) as run:``.

    The corrected command, or the same one, can then use the same name. Only what ``create_run`` and ``lock_run`` wrote
    is removed, and the folder only if it was not there before.
    """
    was_there, recipe = root.exists(), None
    try:
        with interrupt.deferred():  # a Ctrl-C meanwhile would leave the folder of a run that nobody undoes
            run = create_run(root, cache, model, config)
            recipe = (root / "recipe.toml").read_bytes()
        yield run
    except (K5Error, KeyboardInterrupt):
        if recipe is not None:
            # Another process may train it by now, its folder may be gone, and a second Ctrl-C waits.
            with suppress(Locked, OSError, KeyboardInterrupt), interrupt.deferred():
                _undo(root, recipe)
                if not was_there and not any(root.iterdir()):
                    root.rmdir()
        raise


def _undo(root: Path, recipe: bytes) -> None:
    """Remove what ``create_run`` wrote, if there is nothing else.

    Raises:
        Locked: another process has the run.
    """
    with lock_file(root / LOCK):
        is_undone = _remove_new(root, recipe)
        if is_undone and os.name != "nt":  # so that nobody begins in the folder in between
            (root / LOCK).unlink(missing_ok=True)
    if is_undone and os.name == "nt":  # which deletes no file that is open
        (root / LOCK).unlink(missing_ok=True)


def _remove_new(root: Path, recipe: bytes) -> bool:
    """Remove what ``create_run`` wrote but the lock. Returns False, and removes nothing, if there is anything else.

    Args:
        recipe: what it wrote into ``recipe.toml``, into which its user may have written since.
    """
    folders = [root / name for name in ("checkpoints", "samples")]
    ours = {*folders, *(root / name for name in ("recipe.toml", "run.json", LOCK, *REQUESTS.values()))}
    ours = {path for path in ours if path in folders or not path.is_dir()}  # nobody asks with a folder
    others = [path for path in root.iterdir() if path not in ours and not outputs.HARMLESS.fullmatch(path.name)]
    if others or any(any(folder.iterdir()) for folder in folders):
        return False
    if (root / "recipe.toml").is_file() and (root / "recipe.toml").read_bytes() != recipe:
        return False
    for path in sorted(ours - {root / LOCK}):
        path.rmdir() if path in folders else path.unlink(missing_ok=True)
    return True


def remove_leftovers(run: Run) -> None:
    """Remove what killed processes left half written in a run. The caller has the run's lock."""
    folders = [run.root, run.root / "checkpoints", run.root / "samples", *(run.root / "samples").glob("step-*"),
               *(run.root / "samples" / "pairs").glob("*")]  # fmt: skip
    for folder in folders:
        for leftover in files.remove_leftovers(folder) if folder.is_dir() else ():
            console.warn(f"{leftover} was left by a killed process of another user: remove it to free its space")


@contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Let no other process train this run until the end of the block.

    Raises:
        RunError: another process trains it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(run.root / LOCK))
        except Locked as error:
            raise RunError(
                f"{run.root} is being trained by {error.owner}", "Wait for it, or start another run with -o"
            ) from None
        yield


def is_locked(run: Run) -> bool:
    """Whether a process trains this run right now."""
    try:
        with lock_file(run.root / LOCK):
            return False
    except Locked:
        return True


def open_run(root: Path, options: Sequence[str] = ()) -> tuple[Run, ModelConfig, TrainConfig, Path]:
    """An existing run, its configs and the path of its cache.

    Args:
        options: ``table.key=value``, which override its recipe.

    Raises:
        RunError: ``root`` is not a run, or its recipe was changed.
        OutputError: a link in it leads out of it.
    """
    check_inside(root)
    facts = read_facts(root) if (root / "run.json").is_file() else None
    if facts is None or (facts.recipe is None and not (root / "recipe.toml").is_file()):
        raise RunError(
            f"{root} is not a run: it has no recipe.toml and run.json", "Give a folder made by `k5train run`"
        )
    model, config = parse(read_recipe(root, options), {"model": ModelConfig, "train": TrainConfig})
    return Run(root), model, config, cache_of(root, facts)


def free_name(runs: Path, name: str) -> Path:
    """``runs/name``, or ``runs/name-2``, ``-3`` ... if that exists. No run is ever overwritten."""
    candidate, number = runs / name, 2
    while candidate.exists():
        candidate, number = runs / f"{name}-{number}", number + 1
    return candidate
