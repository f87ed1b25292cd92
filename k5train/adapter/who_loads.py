"""Which keys of a LoRA file would diffusers use, and which ComfyUI?

Both ignore unknown keys without an error, so a file can load as nothing at all; ``k5train check-lora`` says so in
advance. diffusers itself loads the file here; ComfyUI's rules are written down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5cache.shared.errors import RunError
from k5train.adapter.files import PREFIX, lora_state_dict
from k5train.adapter.keys import read_file
from k5train.adapter.targets import linear_sizes

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

# How a user of diffusers loads a file.
BY_PIPELINE = "pipe.load_lora_weights(FILE)"
BY_TRANSFORMER = 'pipe.transformer.load_lora_adapter(FILE, prefix="transformer")'

OTHER_MODEL = "its matrices belong to a model of another size"
_CHECKED = "checked"  # the name under which diffusers loads a file here

# comfy/weight_adapter/lora.py: the first of these keys that is there, with its partner.
_COMFY_PAIRS = (
    ("{}.lora_up.weight", "{}.lora_down.weight"),
    ("{}_lora.up.weight", "{}_lora.down.weight"),
    ("{}.lora_B.weight", "{}.lora_A.weight"),
    ("{}.lora.up.weight", "{}.lora.down.weight"),
    ("{}.lora_B", "{}.lora_A"),
    ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"),
    ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
)
# comfy/weight_adapter/lokr.py and loha.py
_COMFY_OTHERS = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
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

    @property
    def loads_all(self) -> bool:
        """Whether every key takes effect."""
        return not self.error and not self.unused and bool(self.modules)


@dataclass(frozen=True)
class Report:
    """Which programs load a LoRA file, and how much of it."""

    path: Path
    kind: str
    """``lora``; ``dora``, which also has magnitudes; ``lokr`` or ``loha``, which are products of another kind."""
    num_keys: int
    ranks: tuple[int, ...]
    """Every rank that a module has."""
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]
    programs: tuple[Program, ...]

    @property
    def is_good(self) -> bool:
        """Whether both programs load all of it."""
        return all(program.loads_all for program in self.programs)


def check_lora(path: Path, transformer: Kandinsky5Transformer3DModel) -> Report:
    """What would diffusers and ComfyUI load of this file, whoever wrote it?

    Args:
        transformer: of the architecture in question; its weights may be on the meta device.

    Raises:
        RunError: the file is not safetensors.
    """
    state, metadata = read_file(path)
    sizes = linear_sizes(transformer)
    ranks = {t.shape[0] for k, t in state.items() if t.ndim == 2 and re.search(r"lora_A|lora_down|lora\.down", k)}
    kind = kind_of(state)
    others = (by_diffusers(path, state, transformer, BY_TRANSFORMER),) if kind in ("lokr", "loha") else ()
    return Report(
        path=path,
        kind=kind,
        num_keys=len(state),
        ranks=tuple(sorted(ranks)),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})),
        metadata=metadata,
        programs=(by_diffusers(path, state, transformer), *others, by_comfyui(state, sizes)),
    )


def kind_of(keys: Iterable[str]) -> str:
    """The kind of adapter that a file's keys belong to, as in ``Report.kind``."""
    together = "\n".join(keys)
    kinds = {"lokr": "lokr_", "loha": "hada_", "dora": "lora_magnitude_vector", "": "dora_scale"}
    return next((kind or "dora" for kind, part in kinds.items() if part in together), "lora")


def call_for(algo: str) -> str:
    """The call by which diffusers loads a LoRA of ``train.lora.algo``.

    ``pipe.load_lora_weights`` refuses keys without "lora", which LoKr's are.
    """
    return BY_TRANSFORMER if algo == "lokr" else BY_PIPELINE


def by_diffusers(
    path: Path, state: Mapping[str, Tensor], transformer: Kandinsky5Transformer3DModel, call: str = BY_PIPELINE
) -> Program:
    """Let diffusers load the file into an empty transformer, and list what it loaded."""
    loaded, error = load_by_diffusers(path, transformer, call)
    modules = tuple(dict.fromkeys(re.split(r"\.(?:lora|lokr|hada)_", key)[0] for key in loaded))
    used = {f"{PREFIX}{key}" for key in loaded}
    name = "diffusers" if call == BY_PIPELINE else "diffusers' transformer"
    return Program(name, modules, tuple(key for key in state if key not in used), error)


def load_by_diffusers(
    path: Path, transformer: Kandinsky5Transformer3DModel, call: str = BY_PIPELINE
) -> tuple[dict[str, Tensor], str | None]:
    """What diffusers would load into a transformer.

    Args:
        call: ``BY_PIPELINE`` or ``BY_TRANSFORMER``.

    Returns:
        ``<module>.lora_{A,B}.weight``, ``<module>.lora_magnitude_vector``, ``<module>.lokr_w1`` and so on, with the
        strength folded into ``lora_B`` or ``lokr_w1``; and the error that diffusers raises, or None.
    """
    from diffusers.utils import logging

    _move_off_meta(transformer)
    load: Callable[[Path, Kandinsky5Transformer3DModel], None] = (
        _load_as_pipeline if call == BY_PIPELINE else _load_as_transformer
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the report says what it would warn of
    try:
        load(path, transformer)
        return _loaded_tensors(transformer), None
    except Exception as error:  # whatever it is, a user of the file would get it too
        if "size mismatch" in str(error):
            return {}, OTHER_MODEL
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {}, f"{type(error).__name__}: {first_line[:160]}"
    finally:
        logging.set_verbosity(verbosity)
        transformer.unload_lora()


def _load_as_pipeline(path: Path, transformer: Kandinsky5Transformer3DModel) -> None:
    """Do what ``load_lora_weights`` of ``Kandinsky5T2IPipeline`` does, without a pipeline and its encoders."""
    from diffusers.loaders import KandinskyLoraLoaderMixin as Mixin

    state, metadata = Mixin.lora_state_dict(str(path), return_lora_metadata=True)
    if not all("lora" in key for key in state):
        raise ValueError("Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring.")
    Mixin.load_lora_into_transformer(state, transformer, adapter_name=_CHECKED, metadata=metadata)


def _load_as_transformer(path: Path, transformer: Kandinsky5Transformer3DModel) -> None:
    transformer.load_lora_adapter(str(path), prefix="transformer", adapter_name=_CHECKED)


def _loaded_tensors(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter, by their keys in a file."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    loaded = {}
    for name, layer in transformer.named_modules():
        for part in layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ():
            by_adapter = getattr(layer, part, {})
            if _CHECKED not in by_adapter:
                continue
            value = by_adapter[_CHECKED]
            tensor: Tensor = (value if isinstance(value, Tensor) else value.weight).detach()
            strength = layer.scaling[_CHECKED] if part in ("lora_B", "lokr_w1", "lokr_w1_a", "hada_w1_a") else 1.0
            ending = ".weight" if part in ("lora_A", "lora_B") else ""
            loaded[f"{name}.{part}{ending}"] = tensor * strength
    return loaded


def _move_off_meta(transformer: torch.nn.Module) -> None:
    """Give linears weights on the CPU that take no memory: peft creates an adapter on its linear's device, and on the
    meta device nothing would be loaded."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_meta:
            shape = module.weight.shape
            module.weight = torch.nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def by_comfyui(state: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]]) -> Program:
    """What ComfyUI would load, by ``comfy/lora.py``: ``model_lora_keys_unet`` for Kandinsky 5, then ``load_lora``.

    Its names for a module ``a.b`` are ``lora_unet_a_b``, ``diffusion_model.a.b``, ``a.b`` and ``transformer.a.b``.
    Matrices of another shape than the weight's are loaded, and ignored with a line in its log when it draws.
    """
    adapted, used = [], set[str]()
    for module, size in sizes.items():
        for name in (f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{module}", module,
                     f"transformer.{module}"):  # fmt: skip
            pairs = [(up.format(name), down.format(name)) for up, down in _COMFY_PAIRS]
            pair = next((pair for pair in pairs if pair[0] in state), None)
            others = [key for other in _COMFY_OTHERS if (key := f"{name}.{other}") in state]
            if pair and pair[1] not in state:
                return Program("ComfyUI", (), tuple(state), f"KeyError: {pair[1]}")
            if pair and (state[pair[0]].shape[0], state[pair[1]].shape[-1]) != size:
                return Program("ComfyUI", (), tuple(state), OTHER_MODEL)
            if pair or others:
                adapted.append(module)
                used.update(pair or (), others)
                used.update(
                    key for end in ("alpha", "dora_scale", "reshape_weight") if (key := f"{name}.{end}") in state
                )
    return Program("ComfyUI", tuple(dict.fromkeys(adapted)), tuple(key for key in state if key not in used), None)


def compare_saved(
    path: Path, transformer: Kandinsky5Transformer3DModel, empty: Kandinsky5Transformer3DModel, call: str
) -> None:
    """Have diffusers load a file that was just saved, and compare it with the adapter that it was saved from.

    Args:
        transformer: with the adapter.
        empty: the same architecture on the meta device.
        call: how a user of diffusers loads it, from ``call_for``.

    Raises:
        RunError: diffusers would load other numbers, or fewer.
    """
    expected = {key.removeprefix(PREFIX): tensor for key, tensor in lora_state_dict(transformer).items()}
    loaded, error = load_by_diffusers(path, empty, call)
    different = [key for key in expected if key not in loaded or not torch.equal(loaded[key].float(), expected[key])]
    if error or different or len(loaded) != len(expected):
        reason = error or f"{len(different) or len(loaded) - len(expected)} of {len(expected)} tensors differ"
        raise RunError(
            f"diffusers does not load {path} as it was trained: {reason}",
            "Keep the file and report this; `k5train check-lora` shows what is loaded",
        )
