"""With which factor does a LoRA file want its matrices multiplied?

Its ``.alpha`` tensors say so, or else peft's config: diffusers writes that into the file's ``lora_adapter_metadata``,
peft into ``adapter_config.json`` beside its own file. Without either the factor is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.foreign import shown
from k5cache.shared.patterns import Pattern, PatternProblem, Steps
from k5cache.shared.plain import parse_json, read_text

PEFTS = 8  # peft's LoraConfig: the default of r and of lora_alpha
_OF_PEFT = "base_model.model."
_COMPONENT = re.compile(r"(?:transformer|text_encoder(?:_\d+)?|unet)\.")


@dataclass(frozen=True)
class PeftConfig:
    """What peft's config says of ranks and strengths."""

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[Pattern, int], ...]
    alpha_pattern: tuple[tuple[Pattern, float], ...]
    use_rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank that the config says a module has."""
        return next((rank for pattern, rank in self.rank_pattern if pattern.fullmatch(module)), self.rank)

    def strength_of(self, module: str) -> float:
        """What peft multiplies a module's ``B A`` with."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if pattern.fullmatch(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _pattern(text: str, steps: Steps) -> Pattern:
    """One key of ``rank_pattern`` or ``alpha_pattern``: an expression for the end of a module's name.

    Raises:
        PatternProblem: it cannot be used; names it.
    """
    try:
        Pattern(text)
        return Pattern(rf"(?:.*\.)?(?:{text})", steps)  # peft's get_pattern_key
    except PatternProblem as problem:
        raise PatternProblem(f"its pattern {shown(text, 80)!r} {problem}") from None


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
    try:
        its_rank = config.rank_of(module)
        if its_rank == rank:
            return config.strength_of(module)
    except PatternProblem as problem:
        raise _unclear(f"peft's config of {path}", f"a pattern in it {problem}") from None
    raise RunError(
        f"{path} has matrices of rank {rank} for {module}, its config says {its_rank}",
        "Save the LoRA again with the program that it comes from: its strength is not clear",
    )


def peft_config(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> PeftConfig | None:
    """peft's config: from diffusers' metadata, or from the file that peft saves beside its own. None without one.

    Raises:
        RunError: it cannot be read.
    """
    keys = list(keys)
    values = adapter_metadata(path, keys, metadata)
    if values is not None:
        return _parse(values, _where(path)) if values else None
    beside = path.with_name("adapter_config.json")
    if not beside.is_file() or not all(key.startswith(_OF_PEFT) for key in keys):
        return None
    try:
        text = read_text(beside)
    except (OSError, ValueError) as error:
        raise _unclear(str(beside), getattr(error, "strerror", None) or str(error)) from error
    return _parse(_read(text, str(beside)), str(beside))


def adapter_metadata(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What a file's ``lora_adapter_metadata`` says of the transformer; None without it.

    Raises:
        RunError: it is not an object of JSON.
    """
    if "lora_adapter_metadata" not in metadata:
        return None
    return _of_transformer(_read(metadata["lora_adapter_metadata"], _where(path)), keys)


def _where(path: Path) -> str:
    return f"The lora_adapter_metadata of {path}"


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
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
    steps = Steps()
    try:
        rank_pattern = {str(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()}
        alpha_pattern = {str(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()}
        config = PeftConfig(
            rank=int(values.get("r", PEFTS)),
            alpha=float(values.get("lora_alpha", PEFTS)),
            rank_pattern=tuple((_pattern(text, steps), rank) for text, rank in rank_pattern.items()),
            alpha_pattern=tuple((_pattern(text, steps), alpha) for text, alpha in alpha_pattern.items()),
            use_rslora=bool(values.get("use_rslora")),
        )
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise _unclear(where, str(error)) from error
    if min((config.rank, *rank_pattern.values())) < 1:
        raise _unclear(where, "a rank is below 1")
    if not all(math.isfinite(alpha) for alpha in (config.alpha, *alpha_pattern.values())):
        raise _unclear(where, "an alpha is not a finite number")
    return config


def _unclear(where: str, reason: str) -> RunError:
    return RunError(
        f"{where} cannot be used: {reason}", "Save the LoRA again where it comes from: its strength is not clear"
    )
