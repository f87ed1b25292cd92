"""What does a run need on disk to continue exactly where it was? The adapter, the optimizer and its progress.

There is no random state, because every draw is a function of the seed and the step. A folder such as
``state/step-000250`` appears by a rename, and then the one before it is removed, so that a kill at any instant leaves a
whole state. The files are safetensors and JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.files import sync_file, sync_folder

_STATE = re.compile(r"step-\d{6,}", re.ASCII)
_HALF = re.compile(r"\.tmp-(old-)?step-\d{6,}", re.ASCII)
_FILES = re.compile(r"\w+\.safetensors|state\.json|\.tmp\w+", re.ASCII)  # safetensors itself writes .tmpXXXXXX first


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


def save_state(
    folder: Path, progress: Progress, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> Path:
    """Write the state after ``progress.step`` updates, then remove the one before it.

    Args:
        folder: ``runs/<name>/state``.
        parts: tensors by name for ``adapter``, ``optimizer`` and, if the run has an average, ``ema``.
        facts: what else is saved, as JSON: the run's identity, the optimizer's groups and the plan of a deterministic
            run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{progress.step:06d}"
    remove_leftovers(folder)
    if not target.exists():  # Ctrl-C right after a save saves the same step again
        temporary = folder / f".tmp-{target.name}"
        temporary.mkdir(exist_ok=True)
        for name, tensors in parts.items():
            on_cpu = {key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}
            save_file(on_cpu, temporary / f"{name}.safetensors")
            sync_file(temporary / f"{name}.safetensors")
        document = {"progress": asdict(progress), "parts": sorted(parts), **facts}
        (temporary / "state.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        sync_file(temporary / "state.json")
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(folder)
    for old in _states(folder):
        if old != target:
            _remove(old.rename(folder / f".tmp-old-{old.name}"))
    return target


@dataclass(frozen=True)
class SavedState:
    """A state on disk."""

    folder: Path
    progress: Progress
    facts: Mapping[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part; empty if the run has no such part.

        Raises:
            RunError: the file cannot be read.
        """
        path = self.folder / f"{part}.safetensors"
        if part not in self.facts["parts"]:
            return {}
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise broken(path, error) from error


def latest_state(folder: Path) -> SavedState | None:
    """The state to resume from. None if the run was stopped before it saved one.

    Raises:
        RunError: the newest state cannot be read.
    """
    states = _states(folder)
    if not states:
        return None
    path = states[-1] / "state.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return SavedState(states[-1], Progress(**facts.pop("progress")), facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Remove folders that a kill left half written or half removed. Nothing reads them."""
    for path in folder.glob(".tmp-*"):
        if _HALF.fullmatch(path.name):
            _remove(path)


def remove_states(folder: Path) -> None:
    """Remove every state of a run, for one that will not be resumed, and the folder if nothing else is in it."""
    remove_leftovers(folder)
    for state in _states(folder):
        _remove(state)
    with suppress(OSError):
        folder.rmdir()


def _remove(state: Path) -> None:
    """Remove the files that ``save_state`` writes, then their folder, which stays if anything else is in it."""
    for path in state.iterdir():
        if _FILES.fullmatch(path.name) and path.is_file():
            path.unlink()
    with suppress(OSError):
        state.rmdir()


def differences(before: Any, now: Any, free: Iterable[str] = (), where: str = "") -> list[str]:
    """The fields that differ between two JSON documents, a line for each: ``train.lora.rank: 8, now 16``.

    Args:
        free: dotted fields that may differ, with everything below them.
        where: the dotted field at which the documents are.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        names = {key: f"{where}.{key}".lstrip(".") for key in keys}
        free = set(free)
        return [
            line
            for key, name in names.items()
            if name not in free
            for line in differences(before.get(key), now.get(key), free, name)
        ]
    return [] if before == now else [f"{where}: {_shown(before)}, now {_shown(now)}"]


def _states(folder: Path) -> list[Path]:
    states = [path for path in folder.glob("step-*") if _STATE.fullmatch(path.name) and path.is_dir()]
    return sorted(states, key=lambda path: int(path.name.removeprefix("step-")))


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def broken(path: Path, error: Exception) -> RunError:
    """The error for a file of a state that cannot be read."""
    return RunError(
        f"{path} cannot be read: {error}",
        f"Remove {path.parent} to train again from the start; saved LoRAs stay",
    )
