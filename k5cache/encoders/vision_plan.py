"""What does the vision tower take, and a picture in it? From its config to bytes and operations. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BATCH_PATCHES = 8192  # in one forward pass of ``text_batching = "fast"``: 6 pictures of 512x512
MOST_TOKENS = 65_536  # of a chunk with pictures: what their tower's tokens may take in host memory is 1 GB


@dataclass(frozen=True)
class VisionArchitecture:
    """The numbers of ``vision_config`` in Qwen2.5-VL's config.json that decide memory and time."""

    depth: int
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int
    patch_values: int
    """Numbers in a patch: two equal frames of 14x14 pixels."""
    merged: int
    """Patches that become one token of the text."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VisionArchitecture:
        """From ``text_encoder/config.json``. What it does not say is as in Qwen2.5-VL-7B."""
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584,
                  "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
                  **config.get("vision_config", {})}  # fmt: skip
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        return cls(
            depth=int(vision["depth"]),
            hidden_size=int(vision["hidden_size"]),
            intermediate_size=int(vision["intermediate_size"]),
            out_hidden_size=int(vision["out_hidden_size"]),
            patch_values=int(channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2),
            merged=int(vision["spatial_merge_size"]) ** 2,
        )

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the tower: 0.67 billion in Qwen2.5-VL-7B."""
        width, inner = self.hidden_size, self.intermediate_size
        block = 4 * width**2 + 4 * width + 3 * width * inner + 2 * inner + width + 2 * width
        wide = width * self.merged
        merger = width + wide**2 + wide + wide * self.out_hidden_size + self.out_hidden_size
        return self.depth * block + merger + self.patch_values * width

    def working_bytes(self, num_patches: int, itemsize: int) -> int:
        """Peak of one block's intermediate results: three of the feed-forward's width and eight of the model's, six in
        float32 for the rotation, and the patches themselves."""
        of_patch = itemsize * (3 * self.intermediate_size + 8 * self.hidden_size) + 4 * 6 * self.hidden_size
        return num_patches * (of_patch + self.patch_values * (4 + itemsize))

    def flops(self, num_patches: int) -> float:
        """Operations of so many patches, without the attention scores."""
        return 2.0 * self.num_parameters * num_patches


def picture_tokens(width: int, height: int) -> int:
    """Tokens of a picture that Qwen sees at half its size, estimated: one for 28x28 pixels of that."""
    return max(1, round(height / 56)) * max(1, round(width / 56))
