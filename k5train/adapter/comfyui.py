"""Which keys of a LoRA file would ComfyUI use, and at which strength? Its rules, written down from its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

OTHER_MODEL = "its matrices belong to a model of another size"

# comfy/weight_adapter/lora.py: the first of these keys that is there, with its partner.
_PAIRS = (
    ("{}.lora_up.weight", "{}.lora_down.weight"),
    ("{}_lora.up.weight", "{}_lora.down.weight"),
    ("{}.lora_B.weight", "{}.lora_A.weight"),
    ("{}.lora.up.weight", "{}.lora.down.weight"),
    ("{}.lora_B", "{}.lora_A"),
    ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"),
    ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
)
# comfy/weight_adapter/lokr.py and loha.py
_OTHERS = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
           "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")  # fmt: skip


@dataclass(frozen=True)
class Program:
    """What one program would load of a file."""

    name: str
    modules: tuple[str, ...]
    """The modules that it would adapt."""
    unused: tuple[str, ...]
    """Keys that it would ignore."""
    error: str | None
    """Why it would refuse the whole file."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Module -> the factor that it multiplies the product of the matrices with."""

    @property
    def loads_all(self) -> bool:
        """Whether every key takes effect."""
        return not self.error and not self.unused and bool(self.modules)


def by_comfyui(state: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]]) -> Program:
    """What ComfyUI would load, by ``comfy/lora.py``: ``model_lora_keys_unet`` for Kandinsky 5, then ``load_lora``.

    Its names for a module ``a.b`` are ``lora_unet_a_b``, ``diffusion_model.a.b``, ``a.b`` and ``transformer.a.b``; if
    a file has several, the last one counts. Matrices of another shape than the weight's are loaded, and ignored with a
    line in its log when it draws. It reads no metadata: the strength is ``.alpha`` / rank, or 1 without that key.
    """
    used, strengths = set[str](), dict[str, float]()
    for module, size in sizes.items():
        names = (f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{module}", module, f"transformer.{module}")
        spellings = [(name, keys) for name in names if (keys := _keys_under(name, state))]
        if error := next((e for _, keys in spellings if (e := _problem(state, keys, module, size))), None):
            return Program("ComfyUI", (), tuple(state), error)
        if spellings:
            name, keys = spellings[-1]
            used.update(keys)
            used.update(key for end in ("alpha", "dora_scale", "reshape_weight") if (key := f"{name}.{end}") in state)
            strengths[module] = _strength(state, keys, state.get(f"{name}.alpha"))
    return Program("ComfyUI", tuple(strengths), tuple(key for key in state if key not in used), None, strengths)


def _keys_under(name: str, state: Mapping[str, Tensor]) -> list[str]:
    """The keys by which ComfyUI finds a module's adapter: the pair, up before down, or factors of another kind."""
    for up, down in _PAIRS:
        if up.format(name) in state:
            return [up.format(name), down.format(name)]
    return [key for other in _OTHERS if (key := f"{name}.{other}") in state]


def _problem(state: Mapping[str, Tensor], keys: list[str], module: str, size: tuple[int, int]) -> str | None:
    """Why ComfyUI would stop at a module or leave it out."""
    if missing := [key for key in keys if key not in state]:
        return f"KeyError: {missing[0]}"
    if _is_other_kind(keys):
        return None
    up, down = (state[key] for key in keys)
    if up.ndim < 2 or down.ndim < 2:
        return f"its tensors are no matrices at {module}"
    if (up.shape[0], down[0].numel() if len(down) else size[1]) != size:
        return OTHER_MODEL
    if up[0].numel() != len(down) or not len(down):
        return f"its matrices do not fit together at {module}"
    return None


def _strength(state: Mapping[str, Tensor], keys: list[str], alpha: Tensor | None) -> float:
    """alpha / rank, as each of ``comfy/weight_adapter``'s files has it."""
    if alpha is None or alpha.numel() != 1:
        return 1.0
    if not _is_other_kind(keys):
        return float(alpha) / len(state[keys[1]])
    # LoKr takes the rank of its second factor, or else of its first; a whole factor has none. LoHa has only pairs.
    ranks = [len(state[key]) for key in keys if key.endswith(("lokr_w1_b", "lokr_w2_b", "hada_w1_b"))]
    return float(alpha) / ranks[-1] if ranks and ranks[-1] else 1.0


def _is_other_kind(keys: list[str]) -> bool:
    return keys[0].endswith(_OTHERS)
