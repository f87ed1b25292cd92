"""What a run needs to go on exactly where it was: the adapter, the optimizer and how far it came, on disk.

No random state: every draw is a function of (seed, step, row). One folder ``state/step-000250`` appears by a rename,
after which the one before it goes: a kill at any instant leaves one whole state. Safetensors and JSON only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from k5cache.shared.errors import RunError

PARTS = ("adapter", "optimizer", "ema")


@dataclass
class Progress:
    """How far a run came. The loop keeps it up to date; it is saved with the tensors."""

    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Time spent, earlier attempts included."""
    validated: dict[str, int] = field(default_factory=dict)
    """The last step at which each kind of validation was finished."""
    best_loss: float | None = None
    """The lowest held-out loss, and when: what early stopping and ``best.safetensors`` go by."""
    best_step: int | None = None
    not_better: int = 0
    """Measurements of the held-out loss since then."""


def save_state(
    folder: Path, progress: Progress, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> Path:
    """Write the state after ``progress.step`` updates beside the last one, then remove that.

    Args:
        folder: ``runs/<name>/state``.
        parts: ``adapter``, ``optimizer`` and, where there is one, ``ema``: tensors by name.
        facts: what else must come back, as JSON: the recipe, the cache's identity, the optimizer's groups,
            and the plan of a deterministic run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{progress.step:06d}"
    remove_leftovers(folder)
    if not target.exists():  # Ctrl-C just after a save comes here again
        temporary = folder / f".tmp-{target.name}"
        temporary.mkdir()
        for name, tensors in parts.items():
            whole = {key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}
            save_file(whole, temporary / f"{name}.safetensors")
            _fsync(temporary / f"{name}.safetensors")
        document = {"progress": asdict(progress), "parts": sorted(parts), **facts}
        (temporary / "state.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _fsync(temporary / "state.json")
        _fsync(temporary)
        temporary.rename(target)
        _fsync(folder)
    for old in _states(folder):
        if old != target:
            gone = old.rename(folder / f".tmp-old-{old.name}")
            shutil.rmtree(gone)
    return target


@dataclass(frozen=True)
class SavedState:
    """A state on disk."""

    folder: Path
    progress: Progress
    facts: Mapping[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part; none where the run has no such part.

        Raises:
            RunError: the file is not as it was written.
        """
        path = self.folder / f"{part}.safetensors"
        if part not in self.facts["parts"]:
            return {}
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise broken(path, error) from error


def latest_state(folder: Path) -> SavedState | None:
    """The state to go on from; None: the run was stopped before its first.

    Raises:
        RunError: the newest is there and cannot be read.
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
    """Remove what a kill left half written or half removed; nothing reads it."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def differences(before: Any, now: Any, free: Iterable[str] = (), where: str = "") -> list[str]:
    """What is not the same in two plain documents: ``train.lora.rank: 8, now 16``, one line a field.

    Args:
        free: dotted fields that may differ, with all that is below them.
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
    return sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def broken(path: Path, error: Exception) -> RunError:
    """The error for a file of a state that is not as it was written."""
    return RunError(
        f"{path} cannot be read: {error}",
        f"Remove {path.parent} to train again from the start; saved LoRAs are not touched",
    )


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
