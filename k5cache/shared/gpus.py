"""Which GPUs may this process use? Asks the driver's own tool: no torch is imported and no CUDA context is made."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.shared.errors import K5Error
from k5cache.shared.units import count_of

NVIDIA, AMD = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
AMD_BELOW = "ROCR_VISIBLE_DEVICES"
"""AMD's runtime reads it first. The other variables then count among the GPUs that it shows, as torch does."""
_SECONDS = 20
_GPU = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[0-9a-fA-F-]+)\)")
_PART = re.compile(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[0-9a-zA-Z/-]+)\)")
_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
_IN_WSL = "/usr/lib/wsl/lib/nvidia-smi"
"""WSL does not put it on the PATH of every shell."""


@dataclass(frozen=True)
class Slot:
    """Where one process that trains or encodes runs: a GPU, a part of a divided one, or the processor."""

    key: str
    """What the variable is set to, so that a process sees this GPU alone; ``cpu`` for the processor."""
    number: int
    name: str
    variable: str | None = None
    """``CUDA_VISIBLE_DEVICES`` or ``HIP_VISIBLE_DEVICES``; None for the processor."""
    unique: str = ""
    """By which ``ROCR_VISIBLE_DEVICES`` may name it. NVIDIA's are named by their keys."""

    @property
    def words(self) -> str:
        """``GPU 0``, or ``processor``."""
        return f"GPU {self.number}" if self.variable else "processor"

    def is_named(self, entry: str) -> bool:
        """Whether an entry of a variable means it: the beginning of its key, or all of its unique name."""
        return self.key.startswith(entry) or self.unique.casefold() == entry.casefold()

    @property
    def env(self) -> dict[str, str]:
        """The variables with which a process sees this GPU alone."""
        return {self.variable: self.key} if self.variable else {}


def choose_gpus(count: int, env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The first ``count`` of ``visible_gpus``. Raises as ``choose_slots``."""
    return tuple(slot.key for slot in choose_slots(count, env))


def choose_slots(count: int, env: Mapping[str, str] = os.environ) -> tuple[Slot, ...]:
    """The first ``count`` of ``visible_slots``.

    Raises:
        K5Error: there are fewer, or ``count`` is below 1.
    """
    slots = visible_slots(env)
    if count < 1:
        raise K5Error(
            f"--gpus {count} is not a number of GPUs", "Give 1 or more, or leave --gpus out to use the first GPU alone"
        )
    if count <= len(slots):
        return slots[:count]
    every, hidden = installed(), _what_hides(env)
    if not every:
        problem = "neither nvidia-smi nor AMD's driver lists a GPU here"
        raise K5Error(f"--gpus {count}: {problem}", "Leave --gpus out; k5train doctor looks at the driver")
    if len(slots) < len(every):
        of = f"{hidden}={env[hidden]} shows {len(slots)} of this machine's {count_of(len(every), 'GPU')}"
    else:
        of = f"this machine has {count_of(len(every), 'GPU')}"
    fix = f"Use --gpus {len(slots)}" if slots else "Leave --gpus out"
    raise K5Error(f"--gpus {count}: {of}", fix + (f", or change {hidden}" if len(slots) < len(every) else ""))


def visible_gpus(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What to put into ``variable_of(env)`` for each GPU that a process with these variables may use."""
    return tuple(slot.key for slot in visible_slots(env))


def visible_slots(env: Mapping[str, str] = os.environ) -> tuple[Slot, ...]:
    """The GPUs that a process with these variables may use, each with what a process is given to see it alone.

    Entries of the variable are passed on as they are. A number in it counts in CUDA's own order, in which the fastest
    GPU is first unless CUDA_DEVICE_ORDER says otherwise, and the driver's tool counts in the order of the slots. Where
    the variable is not set, these are UUIDs, which mean the same in any order.
    """
    slots, value = allowed(env), _value(env)
    if value is None:
        return slots
    entries = [entry.strip() for entry in value.split(",")]
    return tuple(
        replace(slot, key=entry, variable=variable_of(env)) for slot, entry in zip(slots, entries, strict=False)
    )


def variable_of(env: Mapping[str, str] = os.environ) -> str:
    """The variable that says which GPUs a process sees: on AMD's, HIP's own if it is set or none is."""
    if not _is_amd():
        return NVIDIA
    return NVIDIA if NVIDIA in env and AMD not in env else AMD


def allowed(env: Mapping[str, str] = os.environ) -> tuple[Slot, ...]:
    """The GPUs that a process with these variables may use."""
    gpus = installed()
    if _is_amd() and AMD_BELOW in env:
        shown = visible(gpus, env[AMD_BELOW])
        gpus = tuple(replace(slot, key=str(number), number=number) for number, slot in enumerate(shown))
    return visible(gpus, _value(env))


def _what_hides(env: Mapping[str, str]) -> str:
    """The variable by which a process sees fewer GPUs than there are."""
    variable = variable_of(env)
    return AMD_BELOW if variable not in env and _is_amd() and AMD_BELOW in env else variable


def _value(env: Mapping[str, str]) -> str | None:
    return env.get(variable_of(env))


def visible(gpus: Sequence[Slot], value: str | None) -> tuple[Slot, ...]:
    """Those GPUs that the variable's value names, in its order.

    As in the driver and in torch, it ends at the first entry that names none or may mean several, and one that is named
    twice hides all.

    Args:
        value: numbers, or beginnings of names such as ``GPU-8932f937``. None: all.
    """
    if value is None:
        return tuple(gpus)
    chosen: list[Slot] = []
    for entry in (entry.strip() for entry in value.split(",")):
        named = [gpu for gpu in gpus if str(gpu.number) == entry][:1]  # of a divided GPU, a process sees the first part
        named = named or [gpu for gpu in gpus if len(entry) > 4 and gpu.is_named(entry)]
        if len(named) != 1:
            break
        if named[0] in chosen:
            return ()
        chosen.append(named[0])
    return tuple(chosen)


def installed() -> tuple[Slot, ...]:
    """Every GPU of this machine: NVIDIA's, or AMD's if there is none of those."""
    return _nvidia() or _amd()


def _is_amd() -> bool:
    return not _nvidia() and bool(_amd())


@functools.cache
def _nvidia() -> tuple[Slot, ...]:
    """What ``nvidia-smi -L`` lists. The parts of a divided GPU stand for it."""
    program = shutil.which("nvidia-smi") or shutil.which(_IN_WSL)
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
            unique = f"GPU-{facts.get('unique_id', 0):016x}"  # as rocminfo writes it
            found.append((facts.get("cpu_cores_count", 0) > 0, Slot(str(number), number, "an AMD GPU", AMD, unique)))
    alone = tuple(slot for is_within, slot in found if not is_within)
    return alone or tuple(slot for _, slot in found)


def _properties(path: Path) -> dict[str, int]:
    facts: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            facts[name] = int(value)
    return facts
