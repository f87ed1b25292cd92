"""``[train.lora]``: the options of the adapter. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

from k5train.options.removed import LORA, Removed


@dataclass(frozen=True)
class RankConfig:
    """``[[train.lora.ranks]]``: another rank for some modules."""

    target: str
    """A preset or pattern, as in ``targets``; where several match a module, the last one counts."""
    rank: int
    """Rank of the modules that it matches."""

    def check(self) -> list[str]:
        """What is out of range."""
        return [] if self.rank >= 1 else [f"rank must be at least 1, found {self.rank}"]


@dataclass(frozen=True)
class LoraConfig:
    """``[train.lora]``: the adapter."""

    algo: Literal["lora", "rslora", "dora", "lokr"] = "lora"
    """``rslora``: scaled by alpha / sqrt(rank), for high ranks. ``dora``: a trained magnitude for each output besides;
    every step computes the norm of every weight. ``lokr``: Kronecker products, small files; diffusers loads them
    by ``pipe.transformer.load_lora_adapter(FILE, prefix="transformer")``, not by ``pipe.load_lora_weights``. ``dora``
    and ``lokr`` run as peft's modules, not compiled."""
    rank: int = 32
    """Rank of each pair of matrices."""
    ranks: tuple[RankConfig, ...] = ()
    """``[[train.lora.ranks]]`` entries, each ``target`` and ``rank``: another rank for the modules that match."""
    alpha: float | None = None
    """Strength: the adapter is scaled by alpha / rank. None: alpha = rank, as the official trainer does."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    targets: tuple[str, ...] = ("official",)
    """Presets (``official``, ``attention``, ``qkv``) or patterns of module names; a pattern must match something."""
    init_lora: str | None = None
    """Start from this .safetensors file: one of ours, diffusers', peft's, ComfyUI's or kohya's keys. Its rank may be
    smaller than ``rank``."""
    decompose_factor: int = -1
    """Of ``lokr``: how large the first factor may be. -1: as near to square as it goes, the smallest file."""

    removed: ClassVar[Removed] = LORA

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, found {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < inf:
            problems.append(f"alpha must be above 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), found {self.dropout}")
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            problems.append(f"decompose_factor must be -1 or at least 1, found {self.decompose_factor}")
        if not self.targets:
            problems.append("targets must name at least one preset or pattern")
        if self.algo == "lokr" and (self.ranks or self.dropout or self.init_lora or self.alpha is not None):
            problems.append("algo 'lokr' takes rank and targets only: ranks, alpha, dropout and init_lora are for LoRA")
        if self.algo == "dora" and self.init_lora:
            problems.append("init_lora must be a plain LoRA's start: algo 'dora' has magnitudes besides")
        return problems
