"""Which graphics cards and which driver are there? Asked of the system, which knows them even if torch sees none."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """What the system says. Names are "" for what is not there."""

    system: str = "Linux"
    nvidia: str = ""
    """An NVIDIA card's name."""
    driver: str = ""
    """NVIDIA's driver, such as 550.54.15."""
    amd: str = ""
    """An AMD card's name."""
    hidden_by: str = ""
    """A variable that hides all GPUs, with its value."""


def read_machine(root: Path = Path("/")) -> Machine:
    """What this system says of its cards.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    name, driver = _from_nvidia_smi()
    version = _text(root / "proc/driver/nvidia/version")
    driver = driver or next(iter(re.findall(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", version)), "")
    for information in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        name = name or next(iter(re.findall(r"Model:\s*(.+)", _text(information))), "")
    vendors = _display_vendors(root)
    name = name or ("an NVIDIA card" if driver or "0x10de" in vendors else "")
    amd = "an AMD card" if "0x1002" in vendors and (root / "dev/kfd").exists() else ""
    return Machine(platform.system(), name.strip(), driver, amd, _hidden_by(os.environ))


def _from_nvidia_smi() -> tuple[str, str]:
    """The first card's name and the driver, by NVIDIA's own tool; in WSL it is not on every PATH."""
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if tool is None:
        return "", ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer
        return "", ""
    name, _, driver = (answer.strip().splitlines() or [""])[0].rpartition(",")
    return name.strip(), driver.strip()


def _display_vendors(root: Path) -> set[str]:
    devices = root.glob("sys/bus/pci/devices/*")
    return {_text(d / "vendor").strip() for d in devices if _text(d / "class").startswith(("0x03", "0x12"))}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _hidden_by(environ: os._Environ[str]) -> str:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if environ.get(name) is not None and environ[name].strip() in ("", "-1", "NoDevFiles"):
            return f"{name}={environ[name]!r}"
    return ""
