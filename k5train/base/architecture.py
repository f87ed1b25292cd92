"""What is known about the transformer without its weights? Its full size and its number formats."""

from __future__ import annotations

from typing import Any

import torch

from k5cache.shared.kind import Kind

# transformer/config.json of the published checkpoints of Kandinsky 5.0 Image Lite, T2I.
FULL_SIZE: dict[str, Any] = {
    "_class_name": "Kandinsky5Transformer3DModel",
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": 3584,
    "in_text_dim2": 768,
    "time_dim": 512,
    "patch_size": [1, 2, 2],
    "model_dim": 2560,
    "ff_dim": 10240,
    "num_text_blocks": 2,
    "num_visual_blocks": 50,
    "axes_dims": [32, 48, 48],
}


def full_size(kind: Kind) -> dict[str, Any]:
    """transformer/config.json of the published checkpoints for text-to-image or image-to-image."""
    return FULL_SIZE if kind == "t2i" else {**FULL_SIZE, "visual_cond": True}


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
