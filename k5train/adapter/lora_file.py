"""What does the file of a LoRA hold, and are its numbers sound?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k5cache.shared.disk_errors import named
from k5cache.shared.errors import RunError
from k5cache.shared.units import count_of
from k5train.adapter.header import check_is_adapter, check_kind

# The numbers that are read. Integers mean something only together with scales, for which there are no keys.
READABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA's safetensors file. Nothing is unpickled.

    Raises:
        RunError: it cannot be read, is another kind of file, or has no key of an adapter.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


def read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The keys and the metadata of a LoRA's file, without its tensors. Raises as ``read_file``."""
    with _opened(path) as file:
        return list(file.keys()), file.metadata() or {}


def read_some(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Some of its tensors. Their pages leave the memory with them. Raises as ``read_file``."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in keys}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_kind(path)
        with named(path), safe_open(path, framework="pt") as file:
            check_is_adapter(path, list(file.keys()))
            yield file
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise RunError(
            f"{path} cannot be read: it is damaged, cut short or not a .safetensors file ({reason})",
            "Download or copy it again",
        ) from error
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {error.strerror or error}", "Give the .safetensors file of a LoRA"
        ) from error


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The keys of tensors that have NaN or infinity."""
    return [key for key, tensor in state.items() if tensor.dtype in READABLE and not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is neither NaN nor infinite."""
    return math.isfinite(largest(tensor))


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 without numbers. One pass over the tensor, which is not copied."""
    if not tensor.numel():
        return 0.0
    exact = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch has no order of 8-bit floats
    low, high = exact.aminmax()  # both are NaN if any number is
    return max(abs(low.item()), abs(high.item()))


def refuse_not_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a file with NaN or infinity, which would make every picture black or noise.

    Raises:
        RunError: says how many tensors have it.
    """
    if bad := not_finite(state):
        raise RunError(
            f"{path} has NaN or infinity in {len(bad)} of {count_of(len(state), 'tensor')}: {some(bad)}",
            "Its training diverged. Use an earlier checkpoint, or train again with a lower train.optim.lr",
        )


def some(names: Iterable[str], count: int = 2) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
