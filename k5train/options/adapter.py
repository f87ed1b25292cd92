"""``[train.lora]``: the options of the adapter. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from k5cache.shared.model import path_problems


@dataclass(frozen=True)
class RankConfig:
    """``[[train.lora.ranks]]``: a different rank for some modules."""

    target: str
    """A preset or pattern, as in ``targets``. If several entries match a module, the last one counts."""
    rank: int
    """Rank of the modules that match."""

    def check(self) -> list[str]:
        """What is out of range."""
        return [] if self.rank >= 1 else [f"rank must be at least 1, found {self.rank}"]


@dataclass(frozen=True)
class LoraConfig:
    """``[train.lora]``: the adapter."""

    algo: Literal["lora", "rslora", "dora", "lokr"] = "lora"
    """``rslora`` scales by alpha / sqrt(rank), for high ranks. ``dora`` also trains a magnitude for each output, and
    computes the norm of every weight in every step. ``lokr`` trains Kronecker products, which make small files;
    diffusers loads them by ``pipe.transformer.load_lora_adapter(FILE, prefix="transformer")``, not by
    ``pipe.load_lora_weights``. ``dora`` and ``lokr`` run as peft's modules, which are not compiled."""
    rank: int = 32
    """Rank of each pair of matrices, at most the shorter side of the adapted matrix."""
    ranks: tuple[RankConfig, ...] = ()
    """``[[train.lora.ranks]]`` entries with ``target`` and ``rank``: a different rank for the modules that match."""
    alpha: float | None = None
    """Strength: the adapter is scaled by alpha / rank. None: alpha = rank, as in the official trainer."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are dropped in training."""
    targets: tuple[str, ...] = ("official",)
    """Presets (``official``, ``attention``, ``qkv``) or patterns of module names. Each must match something."""
    init_lora: str | None = None
    """Start from this .safetensors file, which has our, diffusers', peft's, ComfyUI's or kohya's keys. Its rank may be
    smaller than ``rank``."""
    decompose_factor: int = -1
    """For ``lokr``: the largest size of the first factor. -1: as square as possible, which gives the smallest file."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [] if self.init_lora is None else path_problems("init_lora", self.init_lora)
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
            problems.append("algo 'lokr' takes only rank and targets: ranks, alpha, dropout and init_lora are for LoRA")
        if self.algo == "dora" and self.init_lora:
            problems.append("init_lora needs a plain LoRA: algo 'dora' also has magnitudes, which the file does not")
        return problems
