"""Are the numbers in a part's config such that modules can be made of them? Looked at before anything is allocated.

A stranger's config may say a width of 1,000,000,000, a negative one or "64": libraries then fill the memory, or raise
whatever they meet first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_WIDTH, _DEPTH, _COUNT = 1 << 17, 1 << 9, 1 << 22
_TEXT = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _DEPTH),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "head_dim"), _COUNT),
}
_MOST: dict[str, dict[str, int]] = {
    "transformer": {
        **dict.fromkeys(("in_visual_dim", "out_visual_dim", "in_text_dim", "in_text_dim2"), _WIDTH),
        **dict.fromkeys(("time_dim", "model_dim", "ff_dim"), _WIDTH),
        **dict.fromkeys(("num_text_blocks", "num_visual_blocks"), _DEPTH),
        "axes_dims": 4096,
    },
    "vae": {
        "block_out_channels": 1 << 14,
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), 1 << 12),
        **dict.fromkeys(("layers_per_block", "norm_num_groups"), _DEPTH),
    },
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}
"""Part -> option -> its largest value, far above the published model's. A list has at most 16 of them."""
_LONGEST = 16
_OBJECTS = ("text_config", "vision_config", "rope_scaling", "rope_parameters")


def size_problems(part: str, config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the numbers of a part's config, a phrase for each."""
    wrong = [name for name in _OBJECTS if not isinstance(config.get(name) or {}, dict)]
    if wrong:
        return [f"{wrong[0]} is {_shown(config[wrong[0]])}, not an object"]
    inner = config.get("text_config") or {}
    problems = []
    for option, most in _MOST.get(part, {}).items():
        for value in (table[option] for table in (config, inner) if table.get(option) is not None):
            is_list = option in ("axes_dims", "block_out_channels")
            if not _is_size(value, most, is_list):
                kind = f"a list of up to {_LONGEST} whole numbers" if is_list else "a whole number"
                problems.append(f"{option} is {_shown(value)}, not {kind} from 1 to {most:,}")
    factor = config.get("scaling_factor") if part == "vae" else None
    if factor is not None and not (_is_number(factor) and math.isfinite(factor) and factor > 0):
        problems.append(f"scaling_factor is {_shown(factor)}, not a number above 0")
    return problems


def _is_size(value: Any, most: int, is_list: bool) -> bool:
    if is_list:
        return isinstance(value, list) and 0 < len(value) <= _LONGEST and all(_is_size(v, most, False) for v in value)
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
