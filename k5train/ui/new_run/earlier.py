"""What did a step take in an earlier run with the same settings? Known without a GPU."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.errors import K5Error
from k5cache.shared.recipe import parse, to_dict
from k5train.options.train import TrainConfig
from k5train.runs.record import flat, read_record
from k5train.ui.listing import all_runs
from k5train.ui.project import Project

_DECIDES = (
    *("batch_size", "unequal_captions", "gradient_accumulation_steps", "base_model_precision", "mixed_precision"),
    *("device", "deterministic", "lora.algo", "lora.rank", "lora.ranks", "lora.targets", "optim.optimizer"),
    *("objective.preservation_weight", "rollout.probability", "tread.routes"),
)
"""The options of ``[train]`` that decide how long a step takes, beside those of ``[train.memory]``."""
_MOST_LOOKED_AT = 500


@dataclass(frozen=True)
class Earlier:
    """A run like the one that is being prepared."""

    name: str
    """Its place in the project."""
    id: str
    seconds_per_step: float


def earlier_run(project: Project, config: TrainConfig, caches: tuple[str, ...]) -> Earlier | None:
    """The newest run with the same settings and caches that says how long its steps took.

    Args:
        caches: as paths from the project.
    """
    ours = deciding({"train": to_dict(config)}, caches)
    newest = sorted(all_runs(project), key=lambda run: run.changed, reverse=True)[:_MOST_LOOKED_AT]
    for run in newest:
        path = run.path / "run.json"
        try:
            stat = path.stat()
            if _settings(path, stat.st_mtime_ns, stat.st_size, project.root) != ours:
                continue
        except OSError:
            continue
        seconds = read_record(run.path).seconds_per_step
        if seconds:
            return Earlier(run.relative, run.id, seconds)
    return None


def deciding(document: Mapping[str, Any], caches: tuple[str, ...]) -> Mapping[str, Any]:
    """What of a recipe decides how long a step takes."""
    values = flat(document.get("train", {}))
    names = [*_DECIDES, *(name for name in values if name.startswith("memory."))]
    data = tuple(str(entry.get("cache")) for entry in values.get("data") or [])
    return {"caches": tuple(sorted(data or caches)), **{name: values.get(name) for name in names}}


@functools.lru_cache(maxsize=_MOST_LOOKED_AT)
def _settings(path: Path, changed: int, num_bytes: int, root: Path) -> Mapping[str, Any] | None:
    """Of an earlier run. Read again once its file has changed."""
    from k5train.runs.recipe import cache_of, read_facts
    from k5train.ui.new_run.allowed import local

    try:
        facts = read_facts(path.parent)
        (config,) = parse(tomllib.loads(facts.recipe or ""), {"train": TrainConfig})
        cache = local(Project(root), str(root / cache_of(path.parent, facts)))
    except (K5Error, OSError, ValueError, AttributeError):
        return None
    return deciding({"train": to_dict(config)}, (cache,))
