"""Which device do the encoders run on? Asked only once there is something to encode: torch takes a second to load."""

from __future__ import annotations

import re

from k5cache.shared.errors import K5Error


def check_name(name: str) -> str:
    """``name`` if it is auto, cpu, cuda or cuda:N; torch is not loaded."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise K5Error(f"--device {name} is not a device", "Use auto, cuda, cuda:1 or cpu")
    return name


def pick_device(name: str) -> str:
    """``auto`` as the device there is.

    Raises:
        K5Error: it is no device, or one that is not here.
    """
    import torch

    if check_name(name) == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and not count:
        raise K5Error(
            f"--device {name}: torch {torch.__version__} sees no CUDA GPU",
            "Use --device cpu, or install torch for CUDA",
        )
    if name.startswith("cuda:") and int(name[5:]) >= count:
        raise K5Error(f"--device {name}: there are {count} GPUs, from cuda:0", "Use one of them")
    return name
