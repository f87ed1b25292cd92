"""Which module and matrix does a key of a LoRA file mean?

Four families of keys are read: diffusers' and ours (``transformer.``), ComfyUI's (``diffusion_model.``), peft's
(``base_model.model.``) or bare module names, and kohya's (``lora_unet_``, for which LyCORIS has ``lycoris_``, and
underscores, ``lora_down``, ``alpha``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

# What torch.compile and FSDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")
_PART = re.compile(
    r"(?:\.(?P<a>lora_A|lora_down)|\.(?P<b>lora_B|lora_up)|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up))"
    r"(?:\.(?P<adapter>[^.]+)(?=\.(?:weight|bias)$))?(?:\.(?P<end>weight|bias))?$|\.(?P<alpha>alpha)$"
)
_TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:lora_te\d*_|lora_clip_|text_encoders?(?:_\d+)?\.|te\d*\.)")

Part = Literal["A", "B", "alpha", "bias", "text encoder", "unknown"]


class Meaning(NamedTuple):
    """What a key means."""

    part: Part
    module: str
    """Its name in the transformer. If there is no such module, its name in the file; empty for ``unknown``."""
    exists: bool
    """Whether the transformer has the module."""
    adapter: str
    """The name that peft gave the adapter, often ``default``; empty without one."""


def meaning_of(key: str, names: Mapping[str, str]) -> Meaning:
    """The module and the part that a key means.

    Args:
        names: module names by their kohya form, which has underscores for dots.
    """
    if _TEXT_ENCODER.match(key):
        return Meaning("text encoder", "", False, "")
    match = _PART.search(key)
    if match is None:
        return Meaning("unknown", "", False, "")
    part: Part = "A" if match["a"] or match["old"] == "down" else "alpha" if match["alpha"] else "B"
    module, exists = _module_of(_WRAPPERS.sub("", key[: match.start()]), names)
    return Meaning("bias" if match["end"] == "bias" else part, module, exists, match["adapter"] or "")


def _module_of(name: str, names: Mapping[str, str]) -> tuple[str, bool]:
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            module = names.get(name.removeprefix(prefix))
            return module or name, module is not None
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name, names.get(name.replace(".", "_")) == name


def flat_names(modules: Iterable[str]) -> dict[str, str]:
    """Module names by their kohya form."""
    return {name.replace(".", "_"): name for name in modules}


def kind_of(keys: Iterable[str]) -> str:
    """The kind of adapter that a file's keys belong to.

    ``lora``; ``dora``, which also has magnitudes; ``lokr`` or ``loha``, which are products of another kind.
    """
    together = "\n".join(keys)
    kinds = {"lokr": "lokr_", "loha": "hada_", "dora": "lora_magnitude_vector", "": "dora_scale"}
    return next((kind or "dora" for kind, part in kinds.items() if part in together), "lora")
