"""Which checks are made, in which order? Quick ones first; what imports torch, asks the hub or compiles comes last."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5cache.shared.checkpoint import folder_on_disk
from k5cache.shared.model import ModelConfig
from k5train.doctor import card, compiler, hub, packages, probe, room, torch_build
from k5train.doctor.check import Check, attempt
from k5train.doctor.machine import Machine, read_machine

_TORCH_SECONDS = 120.0
_KERNEL_SECONDS = 240.0
_HUB_SECONDS = 20.0


@dataclass(frozen=True)
class Step:
    """One check, not made yet. ``activity`` says what will take long, "" if nothing does."""

    name: str
    judge: Callable[[], Check]
    activity: Callable[[], str] = str

    def make(self) -> Check:
        """Make the check; never raises."""
        return attempt(self.name, self.judge)


def steps(vram: str | None = None, model: ModelConfig | None = None) -> list[Step]:
    """All checks in their order.

    Args:
        vram: a card's size to plan for, such as ``"12GB"``. None: the GPU's.
        model: the one to train. None: the published one.
    """
    facts = _Facts(vram, model or ModelConfig())
    quick: dict[str, Callable[[], Check]] = {
        "versions": packages.judge_versions,
        "packages": lambda: packages.judge_packages(
            facts.requirements, packages.installed_versions(facts.requirements)
        ),
        "extras": lambda: packages.judge_extras(facts.requirements, facts.installed),
        "RAM": lambda: room.judge_ram(*room.read_ram()),
        "open files": lambda: room.judge_open_files(system.most_open_files()),
        "K5_HOME": room.judge_home,
        "disk": lambda: room.judge_disk(room.read_volumes(facts.model)),
    }
    slow: list[Step] = [
        Step("hub", lambda: hub.judge_hub(facts.hub), facts.asks_hub),
        Step("torch", lambda: torch_build.judge_torch(facts.torch, facts.machine), lambda: "importing torch"),
        Step("driver", lambda: torch_build.judge_driver(facts.torch, facts.machine)),
        Step("GPU", lambda: card.judge_gpu(facts.torch, facts.machine)),
        Step("bf16", lambda: card.judge_bf16(facts.torch)),
        Step("compile", facts.judge_compiler, facts.tries_kernels),
        Step("int8", lambda: card.judge_int8(facts.torch, facts.kernels[0])),
        Step("attention", lambda: card.judge_attention(facts.torch, facts.kernels[0])),
        Step("plan", facts.judge_plan, facts.plans),
    ]
    return [*(Step(name, judge) for name, judge in quick.items()), *slow]


class _Facts:
    """What several checks need, read when the first of them asks."""

    def __init__(self, vram: str | None, model: ModelConfig) -> None:
        self._vram, self.model = vram, model

    @functools.cached_property
    def requirements(self) -> list[str]:
        return importlib.metadata.requires(packages.DISTRIBUTION) or []

    @functools.cached_property
    def installed(self) -> dict[str, str]:
        return packages.installed_versions(self.requirements)

    @functools.cached_property
    def machine(self) -> Machine:
        return read_machine()

    @functools.cached_property
    def torch(self) -> torch_build.Torch:
        return torch_build.torch_of(*probe.ask("torch", seconds=_TORCH_SECONDS))

    @functools.cached_property
    def kernels(self) -> tuple[probe.Facts, str]:
        """What the kernels do, compiled anew: what an earlier run compiled would hide that a compiler is missing."""
        if not self.torch.cards:
            return {}, "there is no GPU"
        with tempfile.TemporaryDirectory(prefix="k5train-doctor-", ignore_cleanup_errors=True) as folder:
            env = {
                "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            }  # fmt: skip
            return probe.ask("kernels", seconds=_KERNEL_SECONDS, env=env)

    def _is_folder(self) -> bool:
        return Path(self.model.source).expanduser().is_dir()

    def _offline(self) -> str:
        """The variable that forbids requests to the hub, with its value."""
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        are_set = (name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"))
        return next((f"{name}={os.environ[name]}" for name in are_set), "")

    @functools.cached_property
    def hub(self) -> hub.Hub:
        has_model = folder_on_disk(self.model, ("transformer",)) is not None
        if self._is_folder() or self._offline():
            return hub.Hub(has_model, self._is_folder(), self._offline())
        facts, problem = probe.ask("hub", self.model.source, seconds=_HUB_SECONDS)
        problem = "" if facts.get("commit") else facts.get("problem", problem)
        return hub.Hub(has_model, False, "", facts.get("has_token", False), facts.get("status"), problem)

    def asks_hub(self) -> str:
        return "" if self._offline() or self._is_folder() else "asking the hub"

    def tries_kernels(self) -> str:
        return "compiling and trying small kernels, up to 4 minutes" if self.torch.cards else ""

    def plans(self) -> str:
        return "planning a run" if self.torch.cards or self._vram else ""

    def judge_compiler(self) -> Check:
        facts, problem = self.kernels
        result = facts.get("compile", f"{problem}" if self.torch.cards else None)
        return compiler.judge_compiler(compiler.read_compiler(), bool(self.torch.cards), result)

    def judge_plan(self) -> Check:
        if not self.torch.cards and self._vram is None:
            return Check(
                "plan", "good", "no GPU to plan for", "For one that you think of:", ("k5train doctor --vram 12GB",)
            )
        arguments: list[Any] = [self._vram] if self._vram else []
        return card.judge_plan(*probe.ask("plan", *arguments, seconds=_TORCH_SECONDS), self._vram)
