"""Does torch's build suit this machine's card and driver, and which command mends it? Judged from facts, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k5train.doctor.check import Check
from k5train.doctor.machine import Machine

OLDEST_TORCH = (2, 7)
PYTORCH = "https://pytorch.org/get-started/locally"

# The first driver of each version of CUDA, by its first number: NVIDIA's release notes of the CUDA Toolkit.
_CUDA_OF_DRIVER = (
    (580, (13, 0)), (575, (12, 9)), (570, (12, 8)), (560, (12, 6)), (555, (12, 5)), (550, (12, 4)), (545, (12, 3)),
    (535, (12, 2)), (530, (12, 1)), (525, (12, 0)), (520, (11, 8)), (450, (11, 0)),
)  # fmt: skip
_BUILDS = (((13, 0), "cu130"), ((12, 8), "cu128"), ((12, 0), "cu126"))
"""The oldest CUDA of a driver for each of torch's builds, newest first; 12.x builds run with any 12.x driver."""


@dataclass(frozen=True)
class Card:
    """One GPU as torch sees it; sizes in bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    has_bf16: bool
    arch: str = ""
    """An AMD card's architecture, such as gfx1100; "" for others."""

    @property
    def kind(self) -> str:
        """What a build of torch must have kernels for."""
        return self.arch or f"compute capability {_dotted(self.capability)}"


@dataclass(frozen=True)
class Torch:
    """The installed torch. ``version`` is "" if it cannot be imported."""

    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    cards: tuple[Card, ...] = ()
    arch_list: tuple[str, ...] = ()
    problem: str = ""
    """Why it cannot be imported, or why it sees no GPU."""

    @property
    def is_for_cpus(self) -> bool:
        """Whether this build knows no GPU."""
        return not self.cuda and not self.hip


def torch_of(facts: Mapping[str, Any], problem: str) -> Torch:
    """The facts of the probe ``torch``."""
    cards = tuple(
        Card(**{**card, "capability": (card["capability"][0], card["capability"][1])})
        for card in facts.get("cards", ())
    )
    return Torch(
        facts.get("version", ""), facts.get("cuda"), facts.get("hip"), cards, tuple(facts.get("arch_list", ())),
        facts.get("problem", problem),
    )  # fmt: skip


def cuda_of_driver(driver: str) -> tuple[int, int] | None:
    """The newest CUDA that an NVIDIA driver runs; None if it is too old to be in the table, or unknown."""
    number = re.match(r"\d+", driver)
    return next((cuda for first, cuda in _CUDA_OF_DRIVER if number and int(number[0]) >= first), None)


def version_numbers(version: str | None) -> tuple[int, int]:
    """``2.13.0+cpu`` -> ``(2, 13)``."""
    numbers = re.findall(r"\d+", version or "")[:2]
    return (int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0) if numbers else (0, 0)


def judge_torch(torch: Torch, machine: Machine) -> Check:
    """Whether torch is there and is built for this machine's card."""
    build = f"built for CUDA {torch.cuda}" if torch.cuda else f"built for ROCm {torch.hip}" if torch.hip else "for CPUs"
    found = f"torch {torch.version}, {build}"
    if not torch.version:
        return _torch_missing(torch, machine)
    if version_numbers(torch.version) < OLDEST_TORCH:
        return Check("torch", "does not work", found, "Torch must be 2.7 or newer.", install(machine))
    if torch.is_for_cpus and (machine.nvidia or machine.amd):
        meaning = f"This build cannot use {machine.nvidia or machine.amd}. Replace it with the build for the card."
        return Check("torch", "does not work", found, meaning, install(machine))
    if torch.cuda and machine.amd and not machine.nvidia:
        return Check("torch", "does not work", found, f"This build cannot use {machine.amd}.", install(machine))
    if (card := next(iter(torch.cards), None)) and not _has_kernels_for(card, torch.arch_list):
        meaning = f"This build has no kernels for the {card.name}, of {card.kind}."
        return Check("torch", "does not work", found, meaning, install(machine, card.capability))
    if torch.hip:
        meaning = "Nothing was tried on AMD cards. This compares one with diffusers:"
        return Check("torch", "look at this", found, meaning, ("k5train selftest CACHE",))
    if torch.is_for_cpus:
        return Check("torch", "good", found, "Right for a machine without a GPU, such as one for the demo.")
    return Check("torch", "good", found, "The right kind of build for this card." if torch.cards else "")


def _torch_missing(torch: Torch, machine: Machine) -> Check:
    if "No module named 'torch'" in torch.problem:
        return Check("torch", "does not work", "torch is not installed", "Nothing works without it.", install(machine))
    found = f"torch cannot be imported: {torch.problem}"
    return Check("torch", "does not work", found, "Nothing works without it.", install(machine))


def install(machine: Machine, capability: tuple[int, int] = (0, 0)) -> tuple[str, ...]:
    """The commands that replace torch by the build for this machine's card."""
    if machine.amd and not machine.nvidia:
        return ("pip uninstall -y torch", f"# then the command for ROCm from {PYTORCH}")
    if not machine.nvidia:
        return ("pip install torch --index-url https://download.pytorch.org/whl/cpu",)
    cuda = cuda_of_driver(machine.driver)
    # Without a driver the build does not matter to it yet: the one that most drivers run. Blackwell's needs CUDA 12.8.
    lowest = (12, 8) if capability >= (10, 0) or not machine.driver else (0, 0)
    build = next((name for first, name in _BUILDS if max(cuda or (0, 0), lowest) >= first), None)
    if build is None:
        return (f"# update NVIDIA's driver first, then the command for CUDA from {PYTORCH}",)
    return ("pip uninstall -y torch", f"pip install torch --index-url https://download.pytorch.org/whl/{build}")


def _has_kernels_for(card: Card, arch_list: tuple[str, ...]) -> bool:
    """Whether a build has machine code for a card, of its own generation, or code that its driver can compile."""
    if card.arch:
        return not arch_list or card.arch in arch_list
    capability = card.capability
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(arch_list)):
        built = (int(number[:-1]), int(number[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not any(arch.startswith("sm_") for arch in arch_list)  # none known


def judge_driver(torch: Torch, machine: Machine) -> Check:
    """Whether the driver runs the CUDA that torch is built for."""
    if not machine.nvidia:
        amd = f"{machine.amd}; ROCm {torch.hip or 'is not in this torch'}" if machine.amd else "no NVIDIA driver"
        return Check("driver", "good", amd, "" if machine.amd else "Only an NVIDIA card needs it.")
    if not machine.driver:
        meaning = "Install NVIDIA's driver for this card, then restart the machine."
        return Check("driver", "does not work", f"{machine.nvidia} without a working driver", meaning, ("nvidia-smi",))
    cuda = cuda_of_driver(machine.driver)
    found = f"NVIDIA {machine.driver}, " + (f"for CUDA up to {_dotted(cuda)}" if cuda else "of an unknown version")
    built_for = version_numbers(torch.cuda)
    if torch.cuda and cuda and cuda < built_for and cuda[0] == built_for[0]:
        return Check("driver", "good", found, f"Torch is built for CUDA {torch.cuda}, which this driver runs too.")
    if torch.cuda and (cuda or (0, 0)) < built_for:
        meaning = f"Torch is built for CUDA {torch.cuda}: update the driver, or install an older build of torch."
        return Check("driver", "does not work", found, meaning, install(machine))
    return Check("driver", "good", found, f"It runs torch's CUDA {torch.cuda}." if torch.cuda else "")


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
