"""How many jobs may run at once? One a GPU that this process may see, or one on the processor. Imports no torch."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NVIDIA, AMD = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
_SECONDS = 20
_GPU = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[0-9a-fA-F-]+)\)")
_PART = re.compile(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[0-9a-zA-Z/-]+)\)")
_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")


@dataclass(frozen=True)
class Slot:
    """Where one job runs at a time."""

    key: str
    """What the variable is set to, so that a job sees this GPU alone; ``cpu`` for the processor."""
    number: int
    name: str
    variable: str | None = None
    """``CUDA_VISIBLE_DEVICES`` or ``HIP_VISIBLE_DEVICES``; None for the processor."""

    @property
    def words(self) -> str:
        """``GPU 0``, or ``processor``."""
        return f"GPU {self.number}" if self.variable else "processor"

    @property
    def env(self) -> dict[str, str]:
        """The variables with which a process sees this GPU alone."""
        return {self.variable: self.key} if self.variable else {}


PROCESSOR = Slot("cpu", 0, "the processor")


def slots(env: Mapping[str, str] = os.environ) -> tuple[Slot, ...]:
    """The GPUs that a process with these variables may use, or the processor if there are none."""
    nvidia = _nvidia()
    if nvidia:
        return visible(nvidia, env.get(NVIDIA)) or (PROCESSOR,)
    amd = _amd()
    return visible(amd, env.get(AMD, env.get(NVIDIA))) or (PROCESSOR,)


def visible(gpus: Sequence[Slot], variable: str | None) -> tuple[Slot, ...]:
    """Those GPUs that a variable names, in its order. As the driver does, it ends at the first entry that names none.

    Args:
        variable: numbers, or beginnings of names such as ``GPU-8932f937``. None: all.
    """
    if variable is None:
        return tuple(gpus)
    chosen: list[Slot] = []
    for entry in (entry.strip() for entry in variable.split(",")):
        named = [gpu for gpu in gpus if (str(gpu.number) == entry) or (len(entry) > 4 and gpu.key.startswith(entry))]
        if not named or named[0] in chosen:
            break
        chosen.append(named[0])
    return tuple(chosen)


def slot_of(all_slots: Sequence[Slot], variables: Mapping[str, str] | None) -> Slot | None:
    """Which of the slots a process uses that was started otherwise: the first that it may see.

    Args:
        variables: its environment. None: it is not known, and it is taken for one without these variables.

    Returns:
        None if it uses none of them: its variables name another GPU, or none at all.
    """
    first = all_slots[0]
    if first.variable is None:
        return first
    variable = (variables or {}).get(first.variable)
    if variable is None and first.variable == AMD:
        variable = (variables or {}).get(NVIDIA)
    if variable is None:
        return min(all_slots, key=lambda slot: slot.number)
    return next(iter(visible(all_slots, variable.split(",")[0])), None)


@functools.cache
def _nvidia() -> tuple[Slot, ...]:
    """What ``nvidia-smi -L`` lists. The parts of a divided GPU stand for it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run(
            [program, "-L"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return listed(done.stdout.decode("utf-8", "replace"))


def listed(output: str) -> tuple[Slot, ...]:
    """The GPUs in the output of ``nvidia-smi -L``."""
    found: list[Slot] = []
    for line in output.splitlines():
        if gpu := _GPU.match(line):
            found.append(Slot(gpu[3], int(gpu[1]), gpu[2], NVIDIA))
        elif found and (part := _PART.match(line)):
            whole = found[-1]
            name = f"{whole.name.partition(', MIG ')[0]}, MIG {part[1]}"
            if whole.key.startswith("GPU-"):
                found.pop()
            found.append(Slot(part[2], whole.number, name, NVIDIA))
    return tuple(found)


@functools.cache
def _amd() -> tuple[Slot, ...]:
    """The GPUs that AMD's driver lists and that this process may open. One within a processor only if it is alone."""
    found: list[tuple[bool, Slot]] = []
    nodes = []
    with suppress(OSError):
        nodes = sorted(_TOPOLOGY.iterdir(), key=lambda node: int(node.name) if node.name.isdigit() else 0)
    for node in nodes:
        facts = _properties(node / "properties")
        minor = facts.get("drm_render_minor", 0)
        if facts.get("simd_count", 0) > 0 and os.access(f"/dev/dri/renderD{minor}", os.R_OK | os.W_OK):
            number = len(found)
            found.append((facts.get("cpu_cores_count", 0) > 0, Slot(str(number), number, "an AMD GPU", AMD)))
    alone = tuple(slot for is_within, slot in found if not is_within)
    return alone or tuple(slot for _, slot in found)


def _properties(path: Path) -> dict[str, int]:
    facts: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            facts[name] = int(value)
    return facts
