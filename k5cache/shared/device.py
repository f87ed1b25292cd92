"""Which device does a command run on? torch, which takes a second to import, is imported when that is asked."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

from k5cache.shared import console
from k5cache.shared.errors import K5Error
from k5cache.shared.loading import begin_to_collect


def check_name(name: str, option: str = "--device ") -> str:
    """``name`` if it is auto, cpu, cuda or cuda:N; torch is not imported."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        amd = "; AMD cards are called cuda too" if name.partition(":")[0].lower() in ("hip", "rocm", "amd") else ""
        raise K5Error(f"{option}{name} is not a device", f"Use auto, cuda, cuda:1 or cpu{amd}")
    return name


def is_rocm() -> bool:
    """Whether torch is built for AMD cards. It calls them cuda too."""
    import torch

    return getattr(torch.version, "hip", None) is not None


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread of the processor, for thousands of small operations.

    An operation ends when its last thread does, and threads that wait keep their cores busy. If two processes do this
    at once, as in a sweep on two GPUs, threads often wait for one that has no core.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str, option: str = "--device ") -> str:
    """The device that ``name`` means on this machine; ``auto`` is the GPU if there is one.

    A GPU with a number becomes the one that this thread uses: streams, events and kernels that name none would be those
    of the first GPU, and nobody would wait for the work of this one.

    Args:
        option: what the user set, as it begins an error.

    Raises:
        K5Error: ``name`` is no device, or one that this machine does not have.
    """
    import torch

    begin_to_collect()  # what follows may take GPU memory, which garbage would hold on to
    if check_name(name, option) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and not count:
        raise K5Error(
            f"{option}{name}: torch {torch.__version__} sees no GPU",
            f"Use {option}cpu, or install torch's build for your card: k5train doctor says which",
        )
    if name.startswith("cuda:") and int(name[5:]) >= count:
        raise K5Error(f"{option}{name}: there are {count} GPUs, from cuda:0", "Use one of them")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    if name != "cpu" and is_rocm():
        _warn_of_amd(torch.cuda.get_device_name(name))
    return name


@functools.cache
def _warn_of_amd(card: str) -> None:
    """Once in a process."""
    console.warn(
        f"{card} is an AMD card, on which nothing was tried. k5cache selftest and k5train selftest compare what it "
        "computes with diffusers"
    )
