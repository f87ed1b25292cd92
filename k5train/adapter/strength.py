"""With which factor does a LoRA file want its matrices multiplied?

Its ``.alpha`` tensors say so, or else peft's config: diffusers writes that into the file's ``lora_adapter_metadata``,
peft into ``adapter_config.json`` beside its own file. Without either the factor is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from k5cache.shared.errors import RunError

PEFTS = 8  # peft's LoraConfig: the default of r and of lora_alpha
_OF_PEFT = "base_model.model."
_COMPONENT = re.compile(r"(?:transformer|text_encoder(?:_\d+)?|unet)\.")


@dataclass(frozen=True)
class PeftConfig:
    """What peft's config says of ranks and strengths."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank that the config says a module has."""
        return next((r for pattern, r in self.rank_pattern.items() if _matches(pattern, module)), self.rank)

    def strength_of(self, module: str) -> float:
        """What peft multiplies a module's ``B A`` with."""
        alpha = next((a for pattern, a in self.alpha_pattern.items() if _matches(pattern, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None  # peft's get_pattern_key


def strength_of(path: Path, module: str, rank: int, alpha: Tensor | None, config: PeftConfig | None) -> float:
    """The factor for one module of a file.

    Raises:
        RunError: ``alpha`` is not one number, or the config says another rank than the matrices have.
    """
    if alpha is not None:
        if alpha.numel() != 1 or alpha.is_complex():
            raise RunError(
                f"{path} has an alpha of shape {list(alpha.shape)} for {module}, which should be one number",
                "Save the LoRA again with the program that it comes from",
            )
        return float(alpha.double().item()) / rank
    if config is None:
        return 1.0
    if config.rank_of(module) != rank:
        raise RunError(
            f"{path} has matrices of rank {rank} for {module}, its config says {config.rank_of(module)}",
            "Save the LoRA again with the program that it comes from: its strength is not clear",
        )
    return config.strength_of(module)


def peft_config(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> PeftConfig | None:
    """peft's config: from diffusers' metadata, or from the file that peft saves beside its own. None without one.

    Raises:
        RunError: it cannot be read.
    """
    keys = list(keys)
    if "lora_adapter_metadata" in metadata:
        values = _of_transformer(_read(metadata["lora_adapter_metadata"], f"The lora_adapter_metadata of {path}"), keys)
        return _parse(values, f"The lora_adapter_metadata of {path}") if values else None
    beside = path.with_name("adapter_config.json")
    if not beside.is_file() or not all(key.startswith(_OF_PEFT) for key in keys):
        return None
    try:
        text = beside.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unclear(str(beside), str(error)) from error
    return _parse(_read(text, str(beside)), str(beside))


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise _unclear(where, f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise _unclear(where, f"it is a JSON {type(values).__name__}, not an object")
    return values


def _of_transformer(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The transformer's part of diffusers' metadata, as diffusers picks it: ``transformer.r`` and so on.

    ``transformer.save_lora_adapter`` writes neither keys nor metadata with a prefix.
    """
    prefix = "transformer."
    prefixed = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    if prefixed or any(key.startswith(prefix) for key in keys):
        return prefixed
    return {key: value for key, value in values.items() if not _COMPONENT.match(key)}


def _parse(values: Mapping[str, Any], where: str) -> PeftConfig:
    try:
        config = PeftConfig(
            rank=int(values.get("r", PEFTS)),
            alpha=float(values.get("lora_alpha", PEFTS)),
            rank_pattern={str(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
            use_rslora=bool(values.get("use_rslora")),
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (AttributeError, OverflowError, TypeError, ValueError, re.error) as error:
        raise _unclear(where, str(error)) from error
    if min((config.rank, *config.rank_pattern.values())) < 1:
        raise _unclear(where, "a rank is below 1")
    if not all(math.isfinite(alpha) for alpha in (config.alpha, *config.alpha_pattern.values())):
        raise _unclear(where, "an alpha is not a finite number")
    return config


def _unclear(where: str, reason: str) -> RunError:
    return RunError(
        f"{where} cannot be used: {reason}", "Save the LoRA again where it comes from: its strength is not clear"
    )
