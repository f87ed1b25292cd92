"""Which keys of a LoRA file would diffusers use, and which ComfyUI? diffusers is asked, ComfyUI's rules are written.

Both leave keys out without an error: a file can load as nothing at all. ``check-lora`` says so beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k5cache.shared.errors import RunError

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


@dataclass(frozen=True)
class Loader:
    """What one program makes of a file."""

    name: str
    modules: tuple[str, ...]
    """Those that it would adapt."""
    unused: tuple[str, ...]
    """Keys that it would leave out."""
    error: str | None
    """Why it would refuse the whole file."""

    @property
    def loads_all(self) -> bool:
        """Whether every key takes effect."""
        return not self.error and not self.unused and bool(self.modules)


@dataclass(frozen=True)
class Report:
    """What ``check_lora`` found."""

    path: Path
    kind: str
    """``lora``; ``dora``, which has magnitudes besides; ``lokr`` or ``loha``, products of another kind."""
    num_keys: int
    ranks: tuple[int, ...]
    """Every rank there is."""
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]
    loaders: tuple[Loader, ...]

    @property
    def is_good(self) -> bool:
        """Whether both programs load all of it."""
        return all(loader.loads_all for loader in self.loaders)


def check_lora(path: Path, transformer: Kandinsky5Transformer3DModel) -> Report:
    """What diffusers and ComfyUI would load of a file from anywhere.

    Args:
        transformer: of the architecture in question; weights on the meta device will do.

    Raises:
        RunError: the file is not safetensors.
    """
    state, metadata = read_file(path)
    modules = linear_modules(transformer)
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
        loaders=(by_diffusers(path, state, transformer), *others, by_comfyui(state, modules)),
    )


def kind_of(keys: Iterable[str]) -> str:
    """Which kind of adapter a file's keys are of, as ``Report.kind`` says it."""
    together = "\n".join(keys)
    kinds = {"lokr": "lokr_", "loha": "hada_", "dora": "lora_magnitude_vector", "": "dora_scale"}
    return next((kind or "dora" for kind, part in kinds.items() if part in together), "lora")


# How a user of diffusers loads a file.
BY_PIPELINE = "pipe.load_lora_weights(FILE)"


BY_TRANSFORMER = 'pipe.transformer.load_lora_adapter(FILE, prefix="transformer")'


OTHER_MODEL = "its matrices are of a model of another size"


def way_of(algo: str) -> str:
    """The call that loads what ``train.lora.algo`` makes; ``pipe.load_lora_weights`` refuses keys without "lora"."""
    return BY_TRANSFORMER if algo == "lokr" else BY_PIPELINE


def by_diffusers(
    path: Path, state: Mapping[str, Tensor], transformer: Kandinsky5Transformer3DModel, way: str = BY_PIPELINE
) -> Loader:
    """Let diffusers load the file into an empty transformer, and look what has arrived."""
    loaded, error = load_by_diffusers(path, transformer, way)
    modules = tuple(dict.fromkeys(re.split(r"\.(?:lora|lokr|hada)_", key)[0] for key in loaded))
    arrived = {f"transformer.{key}" for key in loaded}
    name = "diffusers" if way == BY_PIPELINE else "diffusers' transformer"
    return Loader(name, modules, tuple(key for key in state if key not in arrived), error)


def load_by_diffusers(
    path: Path, transformer: Kandinsky5Transformer3DModel, way: str = BY_PIPELINE
) -> tuple[dict[str, Tensor], str | None]:
    """What diffusers would put into a transformer.

    Args:
        way: ``BY_PIPELINE`` or ``BY_TRANSFORMER``.

    Returns:
        ``<module>.lora_{A,B}.weight``, ``<module>.lora_magnitude_vector``, ``<module>.lokr_w1`` and so on, with the
        strength folded into ``lora_B`` or ``lokr_w1``; and the error that diffusers raises, if it does.
    """
    from diffusers.utils import logging

    _hollow(transformer)
    load: Callable[[Path, Kandinsky5Transformer3DModel], None] = (
        _load_as_pipeline if way == BY_PIPELINE else _load_as_transformer
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would warn of is what we look for
    try:
        load(path, transformer)
        return _arrived(transformer), None
    except Exception as error:  # whatever it is, a user of the file would meet it too
        if "size mismatch" in str(error):
            return {}, OTHER_MODEL
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {}, f"{type(error).__name__}: {words[:160]}"
    finally:
        logging.set_verbosity(verbosity)
        transformer.unload_lora()


def _load_as_pipeline(path: Path, transformer: Kandinsky5Transformer3DModel) -> None:
    """What ``load_lora_weights`` of ``Kandinsky5T2IPipeline`` does, without a pipeline and its encoders."""
    from diffusers.loaders import KandinskyLoraLoaderMixin as Mixin

    state, metadata = Mixin.lora_state_dict(str(path), return_lora_metadata=True)
    if not all("lora" in key for key in state):
        raise ValueError("Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring.")
    Mixin.load_lora_into_transformer(state, transformer, adapter_name=_CHECKED, metadata=metadata)


def _load_as_transformer(path: Path, transformer: Kandinsky5Transformer3DModel) -> None:
    transformer.load_lora_adapter(str(path), prefix="transformer", adapter_name=_CHECKED)


_CHECKED = "checked"


def _arrived(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter by their keys in a file."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    loaded = {}
    for name, layer in transformer.named_modules():
        for part in layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ():
            holder = getattr(layer, part, {})
            if _CHECKED not in holder:
                continue
            found = holder[_CHECKED]
            tensor: Tensor = (found if isinstance(found, Tensor) else found.weight).detach()
            strength = layer.scaling[_CHECKED] if part in ("lora_B", "lokr_w1", "lokr_w1_a", "hada_w1_a") else 1.0
            ending = ".weight" if part in ("lora_A", "lora_B") else ""
            loaded[f"{name}.{part}{ending}"] = tensor * strength
    return loaded


def _hollow(transformer: torch.nn.Module) -> None:
    """Linears on the CPU that take no memory: peft puts an adapter where its linear is, and on meta nothing arrives."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_meta:
            shape = module.weight.shape
            module.weight = torch.nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


# comfy/weight_adapter/lora.py: the first of these that is there, with its partner.
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


def by_comfyui(state: Mapping[str, Tensor], modules: Mapping[str, tuple[int, int]]) -> Loader:
    """What ComfyUI would take, by ``comfy/lora.py``: ``model_lora_keys_unet`` for Kandinsky 5, then ``load_lora``.

    Its names for a module ``a.b``: ``lora_unet_a_b``, ``diffusion_model.a.b``, ``a.b`` and ``transformer.a.b``.
    What does not have the weight's shape it takes, and leaves out with a line in its log when it draws.
    """
    adapted, used = [], set[str]()
    for module, (outputs, inputs) in modules.items():
        for name in (f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{module}", module,
                     f"transformer.{module}"):  # fmt: skip
            pairs = [(up.format(name), down.format(name)) for up, down in _COMFY_PAIRS]
            found = next((pair for pair in pairs if pair[0] in state), None)
            others = [key for other in _COMFY_OTHERS if (key := f"{name}.{other}") in state]
            if found and found[1] not in state:
                return Loader("ComfyUI", (), tuple(state), f"KeyError: {found[1]}")
            if found and (state[found[0]].shape[0], state[found[1]].shape[-1]) != (outputs, inputs):
                return Loader("ComfyUI", (), tuple(state), OTHER_MODEL)
            if found or others:
                adapted.append(module)
                used.update(found or (), others)
                used.update(
                    key for end in ("alpha", "dora_scale", "reshape_weight") if (key := f"{name}.{end}") in state
                )
    return Loader("ComfyUI", tuple(dict.fromkeys(adapted)), tuple(key for key in state if key not in used), None)


def compare_saved(
    path: Path, transformer: Kandinsky5Transformer3DModel, empty: Kandinsky5Transformer3DModel, way: str
) -> None:
    """Load a file that was just saved by diffusers, and compare it with the adapter that it was saved from.

    Args:
        transformer: with the adapter.
        empty: the same architecture on the meta device.
        way: how a user of diffusers loads it, from ``way_of``.

    Raises:
        RunError: diffusers would load other numbers, or fewer.
    """
    from k5train.adapter.attach import PREFIX
    from k5train.adapter.files import lora_state_dict

    expected = {key.removeprefix(PREFIX): tensor for key, tensor in lora_state_dict(transformer).items()}
    loaded, error = load_by_diffusers(path, empty, way)
    odd = [key for key in expected if key not in loaded or not torch.equal(loaded[key].float(), expected[key])]
    if error or odd or len(loaded) != len(expected):
        what = error or f"{len(odd) or len(loaded) - len(expected)} of {len(expected)} tensors differ"
        raise RunError(
            f"diffusers does not load {path} as it was trained: {what}",
            "Keep the file and report this; `k5train check-lora` shows what is loaded",
        )


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        RunError: it is not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}", "Give the .safetensors file of a LoRA") from error


def linear_modules(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear by name: outputs and inputs."""
    found = ((name, m) for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear))
    return {name: (module.out_features, module.in_features) for name, module in found}
