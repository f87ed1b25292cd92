"""What is measured by `k5cache bench --encoders`, on how much, and the lines that come of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from k5cache.encoders.random_model import FULL_CLIP, FULL_TEXT, FULL_VAE
from k5cache.shared import console


@dataclass(frozen=True)
class Sizes:
    """What is measured, and on how much."""

    text: dict[str, Any] = field(default_factory=lambda: FULL_TEXT)
    clip: dict[str, Any] = field(default_factory=lambda: FULL_CLIP)
    vae: dict[str, Any] = field(default_factory=lambda: FULL_VAE)
    num_captions: int = 512
    num_baseline: int = 128
    """Captions of the baseline, and of what is compared with it bit for bit."""
    tokens: tuple[int, int] = (50, 300)
    vram: int = 4 * 2**30
    """The cap of the streamed run."""
    num_images: int = 48
    side: int = 1024
    source: tuple[int, int] = (1536, 1152)
    """(width, height) of the JPEG files that images are loaded from."""


@dataclass
class Measurements:
    """Lines of the tables, as they are measured."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, value: str, remark: str = "", **values: Any) -> None:
        """One line, shown at once; ``values`` for scripts."""
        self.rows.append((what, value, remark))
        self.values.update(values)
        console.note(f"{what}: {value}" + (f" ({remark})" if remark else ""))
