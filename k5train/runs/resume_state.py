"""What does a run need on disk to continue exactly where it was? The adapter, the optimizer and its progress.

There is no random state, because every draw is a function of the seed and the step. A folder such as
``state/step-000250`` appears by a rename, and the one before it is kept, so that a kill at any instant leaves a whole
state, and damage to one costs only the steps since the one before. The files are safetensors, and ``step.json``, which
has the progress, the sha256 of every other file and its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared import console
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import RunError
from k5cache.shared.files import make_folder, sync_file, sync_folder
from k5cache.shared.plain import read_plain
from k5cache.shared.sealed import Digest, seal, unseal
from k5train.runs.recipe import RECIPE, caches_of

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
_MOST_MANIFEST_BYTES = 64 << 20
MANIFEST = "step.json"
INEXACT = "train.deterministic=false"
UNSEALED = "state.json"
"""What versions wrote instead that did not save checksums. Their states are still read."""
_STATE = re.compile(r"step-\d{6,}", re.ASCII)
_HALF = re.compile(r"\.tmp-(old-)?step-\d{6,}", re.ASCII)
_FILES = re.compile(r"\w+\.safetensors|step\.json|state\.json|\.tmp\w+", re.ASCII)  # safetensors writes .tmpXXXXXX


@dataclass
class Progress:
    """How far a run is. The loop updates it, and it is saved with the tensors."""

    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Time spent, including before earlier stops."""
    validated: dict[str, int] = field(default_factory=dict)
    """The last step at which each kind of validation was done."""
    best_loss: float | None = None
    """The lowest held-out loss. It decides about early stopping and ``<name>-best.safetensors``."""
    best_step: int | None = None
    """The step of the lowest held-out loss."""
    not_better: int = 0
    """Measurements of the held-out loss after ``best_step``."""
    asked: list[int] = field(default_factory=list)
    """Steps whose checkpoint somebody asked for. These LoRAs stay whatever ``checkpoints_total_limit`` is."""
    metrics: Digest | None = None
    """``metrics.jsonl`` as it was when the state was saved."""


def save_state(
    folder: Path, progress: Progress, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> Path:
    """Write the state after ``progress.step`` updates. It and the one before it stay, older ones are removed.

    Args:
        folder: ``runs/<name>/state``.
        parts: tensors by name for ``adapter``, ``optimizer`` and, if the run has an average, ``ema``.
        facts: what else is saved, as JSON: the run's identity, the optimizer's groups and the plan of a deterministic
            run.
    """
    from safetensors.torch import save_file

    make_folder(folder)
    target = folder / f"step-{progress.step:06d}"
    remove_leftovers(folder)
    if not target.exists():  # Ctrl-C right after a save saves the same step again
        temporary = folder / f".tmp-{target.name}"
        temporary.mkdir(exist_ok=True)
        files = {}
        for name, tensors in parts.items():
            path = temporary / f"{name}.safetensors"
            with named(path):
                save_file({key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}, path)
            sync_file(path)
            files[path.name] = asdict(Digest.of(path))
        document = {"format": FORMAT, "files": files, "progress": _written(progress), "parts": sorted(parts), **facts}
        with named(temporary / MANIFEST):
            (temporary / MANIFEST).write_bytes(seal(document))
        sync_file(temporary / MANIFEST)
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(folder)
    older = [state for state in _states(folder) if _step(state) < progress.step]
    for state in older[:-1]:
        _retire(state)
    return target


def _written(progress: Progress) -> dict[str, Any]:
    """The fields of a progress. Earlier versions refuse one that they do not know, so ``asked`` is there if it must."""
    return {name: value for name, value in asdict(progress).items() if name != "asked" or value}


@dataclass(frozen=True)
class SavedState:
    """A state on disk."""

    folder: Path
    progress: Progress
    facts: Mapping[str, Any]
    files: Mapping[str, Digest] | None
    """What each file must be. None: an earlier version saved the state without checksums."""

    def check(self) -> None:
        """Compare every file with its checksum. Say so if there is none.

        Raises:
            RunError: a file is missing or has changed; names it and offers the state before this one.
        """
        if self.files is None:
            console.note(f"{self.folder} is of an earlier version, without checksums: it is used as it is")
        for name in self.files or ():
            self._check(name)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part; empty if the run has no such part.

        Raises:
            RunError: the file has changed or cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{part}.safetensors"
        if part not in self.facts["parts"]:
            return {}
        self._check(path.name)
        try:
            with named(path):
                return load_file(path)
        except SafetensorError as error:
            raise broken(path, error) from error

    def _check(self, name: str) -> None:
        problem = _file_problem(self.folder / name, (self.files or {}).get(name))
        if problem:
            raise broken(self.folder / name, problem)


def latest_state(folder: Path, step: int | None = None) -> SavedState | None:
    """The state to resume from. None if the run was stopped before it saved one.

    Args:
        folder: ``runs/<name>/state``.
        step: the state of this step and not the newest.

    Raises:
        RunError: it cannot be read, or there is none of that step.
    """
    states = _states(folder)
    chosen = [state for state in states if step is None or _step(state) == step]
    if step is not None and not chosen:
        steps = ", ".join(str(_step(state)) for state in states)
        raise RunError(
            f"{folder.parent} has no state of step {step}",
            f"Use --step with one of: {steps}" if steps else "Leave --step out",
        )
    if not chosen:
        return None
    try:
        return _read(chosen[-1])
    except (FileNotFoundError, ValueError) as error:
        raise broken(_manifest(chosen[-1]), error) from error


def _read(state: Path) -> SavedState:
    """The state in a folder, its tensors not read.

    Raises:
        ValueError, OSError: its manifest is missing or damaged, or is that of another step.
    """
    path = _manifest(state)
    is_sealed = path.name == MANIFEST
    raw = read_plain(path, _MOST_MANIFEST_BYTES)
    try:
        facts = unseal(raw) if is_sealed else json.loads(raw)
        version = facts.pop("format", 0)
        if is_sealed and version != FORMAT:
            raise ValueError(f"it is of another version: format {version}")
        files = {str(name): Digest.read(d) for name, d in facts.pop("files").items()} if is_sealed else None
        progress = facts.pop("progress")
        metrics = progress.pop("metrics", None)
        progress = Progress(**progress, metrics=Digest.read(metrics) if metrics else None)
        _ = facts["parts"], facts["identity"], facts["optimizer"]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a run's state ({error})") from error
    if progress.step != _step(state):
        raise ValueError(f"it says step {progress.step}, and its folder step {_step(state)}")
    return SavedState(state, progress, facts, files)


def remove_after(folder: Path, step: int) -> None:
    """Remove the states beyond ``step``, from which the run goes on."""
    for state in _states(folder):
        if _step(state) > step:
            console.note(f"Going back to step {step}: the state of step {_step(state)} is removed")
            _retire(state)


def remove_leftovers(folder: Path) -> None:
    """Remove folders that a kill left half written or half removed. Nothing reads them."""
    for path in folder.glob(".tmp-*"):
        if _HALF.fullmatch(path.name):
            _remove(path)


def remove_states(folder: Path) -> None:
    """Remove every state of a run, for one that will not be resumed, and the folder if nothing else is in it."""
    remove_leftovers(folder)
    for state in _states(folder):
        _retire(state)
    with suppress(OSError):
        folder.rmdir()


def _retire(state: Path) -> None:
    """Remove a state under a name that is no state's, since a kill may come in between. Files of others keep theirs."""
    half = state.rename(state.parent / f".tmp-old-{state.name}")
    _remove(half)
    if half.exists():
        half.rename(state)


def _remove(state: Path) -> None:
    """Remove the files that ``save_state`` writes, then their folder, which stays if anything else is in it."""
    for path in state.iterdir():
        if _FILES.fullmatch(path.name) and path.is_file():
            path.unlink()
    with suppress(OSError):
        state.rmdir()


def broken(path: Path, problem: Exception | str) -> RunError:
    """The error for a file of a state that has changed or cannot be read, with the command that goes on without it."""
    state, run = path.parent, path.parent.parent.parent
    earlier = [s for s in _states(state.parent) if _step(s) < _step(state) and _is_whole(s)]
    if earlier:
        command = console.command("k5train", "resume", run, step=_step(earlier[-1]))
        fix = f"To go on from the state before it: {command}"
    else:
        command = console.command("k5train", "run", *caches_of(run), recipe=run / RECIPE, out=f"{run}-2")
        fix = f"To train again from the start: {command}"
    words = "it is missing" if isinstance(problem, FileNotFoundError) else str(problem).splitlines()[0][:200]
    return RunError(f"{path} cannot be used: {words}", fix)


def same_command(run: Path, gpus: int | None = None, **options: object) -> str:
    """The command that goes on with a run of which nothing is changed yet: the one that is running, if it resumes.

    Its --set and --cache are not in the run's recipe before the first step, and the states after --step still there.

    Args:
        gpus: what ``--gpus`` was.
        options: more of them.
    """
    if sys.argv[1:2] == ["resume"]:
        return console.this_command(**options)
    return console.command("k5train", "resume", run, gpus=gpus, **options)


def inexactly(run: Path, gpus: int | None = None) -> str:
    """``same_command``, for a deterministic run without the same bits."""
    return same_command(run, gpus, set=INEXACT)


def _is_whole(state: Path) -> bool:
    try:
        saved = _read(state)
    except (OSError, ValueError):
        return False
    return not any(_file_problem(state / name, digest) for name, digest in (saved.files or {}).items())


def _file_problem(path: Path, digest: Digest | None) -> str | None:
    """What is wrong with a file of a state; None if nothing is, or if there is no checksum to compare with."""
    if not path.is_file():
        return "it is missing"
    if digest is not None and Digest.of(path) != digest:
        return "it is not the file that was written: its checksum does not match"
    return None


def _manifest(state: Path) -> Path:
    is_unsealed = (state / UNSEALED).is_file() and not (state / MANIFEST).is_file()
    return state / (UNSEALED if is_unsealed else MANIFEST)


def _states(folder: Path) -> list[Path]:
    states = [path for path in folder.glob("step-*") if _STATE.fullmatch(path.name) and path.is_dir()]
    return sorted(states, key=_step)


def _step(state: Path) -> int:
    return int(state.name.removeprefix("step-"))
