"""Which dtype does an encoder compute and store in, by the name that the options have for it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int8": "bfloat16"}
"""int8 is the precision of weights; the numbers are bfloat16."""
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 2}


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of this name in ``DTYPES``."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype
