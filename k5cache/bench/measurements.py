"""What does `k5cache bench --encoders` measure, and with which results? Sizes, and the lines of its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from k5cache.encoders.random_model import FULL_CLIP, FULL_TEXT, FULL_VAE
from k5cache.shared import console


@dataclass(frozen=True)
class Sizes:
    """The models that are measured, and the number of captions and images."""

    text: dict[str, Any] = field(default_factory=lambda: FULL_TEXT)
    clip: dict[str, Any] = field(default_factory=lambda: FULL_CLIP)
    vae: dict[str, Any] = field(default_factory=lambda: FULL_VAE)
    vision: dict[str, Any] | None = None
    """The vision tower of image-to-image; None for text-to-image."""
    num_captions: int = 512
    num_baseline: int = 128
    """Captions of the baseline, and of the exact pass that is compared with it bit for bit."""
    tokens: tuple[int, int] = (50, 300)
    vram: int = 4 * 2**30
    """Bytes that the streamed run may take."""
    num_images: int = 48
    side: int = 1024
    source: tuple[int, int] = (1536, 1152)
    """(width, height) of the JPEG files that images are loaded from."""


@dataclass
class Measurements:
    """The lines of the table, and the numbers in them for scripts."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: str, remark: str = "", **values: Any) -> None:
        """Add a line and show it at once. ``values`` are its numbers for scripts."""
        self.rows.append((name, value, remark))
        self.values.update(values)
        console.note(f"{name}: {value}" + (f" ({remark})" if remark else ""))
