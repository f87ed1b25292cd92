"""How does a shard describe and store tensors? As bytes, because Arrow has no bfloat16."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
MAX_TENSOR_BYTES = 1 << 28
"""256 MiB. A file that claims more is not ours: the largest real tensor, 1,024 tokens x 3584 float32, has 14 MiB."""


@dataclass(frozen=True)
class TensorSpec:
    """Data type and shape of one tensor column, the same for every row of a shard.

    Args:
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``uint8``; little-endian, C order.
        shape: sizes. At most one is ``None``, which stands for the row's ``n_tokens``.

    Raises:
        ValueError: the dtype is unknown, a size is below 1, two sizes are None, or ``MAX_TENSOR_BYTES`` is exceeded.
    """

    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if len(self.shape) > 8 or self.shape.count(None) > 1:
            raise ValueError(f"shape {list(self.shape)[:9]} has more than 8 sizes, or more than one open size")
        if any(type(size) is not int or size < 1 for size in self.shape if size is not None):
            raise ValueError(f"shape {list(self.shape)} has a size that is not a positive integer")
        self.num_bytes(1)

    def sizes(self, length: int) -> tuple[int, ...]:
        """The shape with ``length`` in place of ``None``."""
        return tuple(length if size is None else size for size in self.shape)

    def num_bytes(self, length: int) -> int:
        """The bytes of a row's tensor that has ``length`` tokens."""
        total = math.prod(self.sizes(length)) * ITEM_BYTES[self.dtype]
        if total > MAX_TENSOR_BYTES:
            raise ValueError(f"{self.dtype} {list(self.sizes(length))} is more than {MAX_TENSOR_BYTES >> 20} MiB")
        return total

    def to_json(self) -> dict[str, Any]:
        """``{"dtype": "bfloat16", "shape": [null, 3584]}``."""
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: object) -> TensorSpec:
        """The inverse of ``to_json``. Raises ValueError if ``value`` describes no tensor."""
        if not isinstance(value, Mapping) or not isinstance(value.get("shape"), list):
            raise ValueError("a tensor needs a dtype and a shape")
        return cls(str(value.get("dtype")), tuple(value["shape"]))


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's values in C order, little-endian."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(buffer: bytes | bytearray | memoryview, spec: TensorSpec) -> torch.Tensor:
    """A tensor over ``buffer``, which is copied only if it is read-only.

    Raises:
        ValueError: ``spec`` does not allow this number of bytes.
    """
    import torch

    length = 1
    if None in spec.shape:
        length, rest = divmod(len(buffer), spec.num_bytes(1))
        length = 0 if rest else length
    if length < 1 or len(buffer) != spec.num_bytes(length):
        raise ValueError(f"{len(buffer)} bytes are not a {spec.dtype} tensor of shape {list(spec.shape)}")
    writable = buffer if not memoryview(buffer).readonly else bytearray(buffer)
    return torch.frombuffer(writable, dtype=torch.uint8).view(torch_dtype(spec.dtype)).view(spec.sizes(length))


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    import torch

    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}[name]
