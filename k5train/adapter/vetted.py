"""May diffusers be asked to load a LoRA file that somebody else wrote? Only if its metadata does no more than describe.

diffusers makes peft's config of whatever the file's ``lora_adapter_metadata`` says. There, peft would import a module
that it names (``megatron_core``), make matrices of any rank, factorise every weight (``init_lora_weights``), and use
its texts, and the keys of tensors too, as regular expressions, which can take years.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.foreign import shown
from k5cache.shared.patterns import Pattern, PatternProblem
from k5train.adapter.strength import adapter_metadata

_HIGHEST_RANK = 16_384
_PLAIN_KEY = re.compile(r"[\w.\-/:]+")


def refuse_harmful(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse a file that diffusers must not be asked to load.

    Raises:
        RunError: names what is in its metadata or keys.
    """
    for key in state:
        if not _PLAIN_KEY.fullmatch(key):
            raise RunError(
                f"{path} has a key that no program writes: {shown(key, 80)!r}", "Give the LoRA file of a trainer"
            )
    try:
        values = adapter_metadata(path, state, metadata) or {}
    except RunError:  # it cannot be read, which diffusers finds too
        return
    defaults = _defaults()
    for key, value in values.items():
        is_described = _DESCRIBED.get(key, lambda value, key=key: key in defaults and value in (defaults[key], None))
        if not is_described(value):
            raise RunError(
                f"The lora_adapter_metadata of {path} has {shown(key, 40)} = {shown(repr(value), 80)}, with which peft "
                "would do more than load a LoRA",
                "Save the LoRA again with the program that it comes from, or without its metadata",
            )


def _defaults() -> dict[str, Any]:
    from peft import LoKrConfig, LoraConfig

    return {**LoKrConfig().to_dict(), **LoraConfig().to_dict()}


def _is_anything(value: Any) -> bool:
    """If it makes no sense, such as an alpha of "a", peft says so."""
    return True


def _is_rank(value: Any) -> bool:
    return not (isinstance(value, int | float) and value > _HIGHEST_RANK)


def _is_expression(value: str) -> bool:
    try:
        return Pattern(value).is_quick
    except PatternProblem as problem:
        return str(problem).startswith("is not a regular expression")  # peft says so too


def _are_modules(value: Any) -> bool:
    if isinstance(value, str):
        return _is_expression(value)
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _by_expression(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_table(table: Any) -> bool:
        return not isinstance(table, dict) or all(
            _is_expression(key) and is_value(value) for key, value in table.items()
        )

    return is_table


_DESCRIBED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version", "peft_type", "task_type"), _is_anything),
    **dict.fromkeys(("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "bias"), _is_anything),
    **dict.fromkeys(("decompose_both", "use_effective_conv2d", "rank_dropout_scale"), _is_anything),
    **dict.fromkeys(("lora_alpha", "alpha", "lora_dropout", "rank_dropout", "module_dropout"), _is_anything),
    **dict.fromkeys(("init_lora_weights", "init_weights"), lambda value: value in (True, False, "gaussian", "lycoris")),
    **dict.fromkeys(("target_modules", "exclude_modules"), _are_modules),
    "decompose_factor": _is_anything,
    "r": _is_rank,
    "rank_pattern": _by_expression(_is_rank),
    "alpha_pattern": _by_expression(_is_anything),
}
"""Key -> whether a value of it only describes a LoRA. Any other key must have peft's default."""
