"""Can blocks be compiled: are Triton, a C compiler and Python's headers there, and does a small kernel compile?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from k5train.doctor.check import Check

_EAGERLY = "Blocks then run eagerly, which is slower and needs more memory than the plan says."


@dataclass(frozen=True)
class Compiler:
    """What compiling needs. Names are "" for what is not there."""

    triton: str
    c_compiler: str
    has_headers: bool
    system: str = "Linux"
    python: str = "3.12"


def read_compiler() -> Compiler:
    """What this machine has."""
    names = (os.environ.get("CC", ""), "gcc", "clang", "cc", *(("cl",) if os.name == "nt" else ()))
    c_compiler = next((path for name in names if name and (path := shutil.which(name))), "")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Compiler(_triton(), c_compiler, headers.is_file(), platform.system(), python)


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return ""
    for name in ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def judge_compiler(compiler: Compiler, has_gpu: bool, result: str | None) -> Check:
    """Whether blocks can be compiled.

    Args:
        result: what became of a small kernel: "" compiled, otherwise the reason. None: not tried.
    """
    found = ", ".join([
        f"Triton {compiler.triton}" if compiler.triton else "no Triton",
        compiler.c_compiler or "no C compiler",
        "Python's headers" if compiler.has_headers else "no Python headers",
    ])  # fmt: skip
    if not has_gpu:
        return Check("compile", "good", found, "Without a GPU nothing is compiled by default.")
    if not compiler.triton:
        name = "triton-windows" if compiler.system == "Windows" else "triton"
        return Check("compile", "look at this", found, _EAGERLY, (f"pip install {name}",))
    # Triton for Windows brings a compiler and headers of its own.
    if compiler.system != "Windows" and not compiler.c_compiler:
        return Check("compile", "look at this", found, f"Triton needs a C compiler. {_EAGERLY}", _apt("gcc"))
    if compiler.system != "Windows" and not compiler.has_headers and result != "":
        package = _apt(f"python{compiler.python}-dev")
        return Check("compile", "look at this", found, f"Triton needs Python's headers. {_EAGERLY}", package)
    if result:
        return Check("compile", "look at this", f"{found}; a small kernel fails: {result}", _EAGERLY)
    if result is None:
        return Check("compile", "look at this", f"{found}; a small kernel was not tried")
    return Check("compile", "good", f"{found}; a small kernel compiles", "Blocks are compiled.")


def _apt(package: str) -> tuple[str, ...]:
    return (f"sudo apt-get install {package}",)
