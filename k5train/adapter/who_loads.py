"""Which keys of a LoRA file would diffusers use, which ComfyUI, and at which strength?

Both ignore unknown keys without an error, so a file can load as nothing at all; ``k5train check-lora`` says so in
advance. diffusers itself loads the file here; ComfyUI's rules are written down in ``comfyui.py``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from k5cache.shared.device import one_thread
from k5cache.shared.errors import RunError
from k5train.adapter.comfyui import OTHER_MODEL, Program, by_comfyui
from k5train.adapter.files import PREFIX, lora_state_dict
from k5train.adapter.keys import flat_names, kind_of, meaning_of
from k5train.adapter.lora_file import read_file
from k5train.adapter.pairs import Lora, OtherModel, OtherSize, understand
from k5train.adapter.targets import linear_sizes
from k5train.adapter.vetted import refuse_harmful

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

# How a user of diffusers loads a file.
BY_PIPELINE = "pipe.load_lora_weights(FILE)"
BY_TRANSFORMER = 'pipe.transformer.load_lora_adapter(FILE, prefix="transformer")'

_NO_FIT = "its matrices do not have the shapes that it expects"
_CHECKED = "checked"  # the name under which diffusers loads a file here


@dataclass(frozen=True)
class Report:
    """Which programs load a LoRA file, how much of it, and at which strength."""

    path: Path
    kind: str
    """As ``kind_of`` says."""
    num_keys: int
    ranks: tuple[int, ...]
    """Every rank that a module has."""
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]
    programs: tuple[Program, ...]
    lora: Lora | None
    """What it holds as a plain LoRA. None: it cannot be read as one, and so neither exported nor merged."""
    refusal: RunError | None
    """Why not, as `k5train export` says it."""

    @property
    def differing(self) -> list[str]:
        """Modules to which two programs apply different strengths, or another one than the file states."""
        stated = [self.lora.strengths] if self.lora else []
        known = [program.strengths for program in self.programs if program.strengths] + stated
        modules = dict.fromkeys(module for strengths in known for module in strengths)
        return [module for module in modules if not _agree([s[module] for s in known if module in s])]

    @property
    def is_good(self) -> bool:
        """Whether both programs load all of it, and alike."""
        return self.lora is not None and all(p.loads_all for p in self.programs) and not self.differing


def _agree(strengths: Sequence[float]) -> bool:
    return all(math.isclose(strength, strengths[0], rel_tol=1e-5) for strength in strengths[1:])


def check_lora(path: Path, transformer: Kandinsky5Transformer3DModel) -> Report:
    """What would diffusers and ComfyUI load of this file, whoever wrote it?

    Args:
        transformer: of the architecture in question; its weights may be on the meta device.

    Raises:
        RunError: the file is not a LoRA in safetensors, is one of another model, or must not be given to diffusers.
    """
    state, metadata = read_file(path)
    refuse_harmful(path, state, metadata)
    sizes = linear_sizes(transformer)
    kind = kind_of(state)
    programs: tuple[Program, ...]
    lora, refusal = None, None
    try:
        lora = understand(path, state, metadata, sizes)
    except OtherModel:
        raise
    except RunError as error:
        refusal = error
    programs = (by_diffusers(path, state, transformer), by_comfyui(state, sizes))
    if kind in ("lokr", "loha"):
        programs = (programs[0], by_diffusers(path, state, transformer, BY_TRANSFORMER), programs[1])
    if not isinstance(refusal, OtherSize):
        programs = tuple(replace(p, error=_NO_FIT) if p.error == OTHER_MODEL else p for p in programs)
    pairs = lora.pairs if lora else {}
    ranks = {down.shape[0] for down, _ in pairs.values()}
    return Report(
        path=path,
        kind=kind,
        num_keys=len(state),
        ranks=tuple(sorted(ranks)),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})),
        metadata=metadata,
        programs=programs,
        lora=lora,
        refusal=refusal,
    )


def call_for(algo: str) -> str:
    """The call by which diffusers loads a LoRA of ``train.lora.algo``.

    ``pipe.load_lora_weights`` refuses keys without "lora", which LoKr's are.
    """
    return BY_TRANSFORMER if algo == "lokr" else BY_PIPELINE


def by_diffusers(
    path: Path, state: Mapping[str, Tensor], transformer: Kandinsky5Transformer3DModel, call: str = BY_PIPELINE
) -> Program:
    """Let diffusers load the file into an empty transformer, and list what it loaded."""
    loaded = _load(path, transformer, call)
    names = flat_names(_module_of(key) for key in loaded.tensors)
    arrived = {key: module for key in state if (module := _arrived(key, state[key], loaded, names))}
    modules = tuple(dict.fromkeys(arrived.values()))
    strengths = {module: loaded.strengths[module] for module in modules if module in loaded.strengths}
    name = "diffusers" if call == BY_PIPELINE else "diffusers' transformer"
    return Program(name, modules, tuple(key for key in state if key not in arrived), loaded.error, strengths)


def _arrived(key: str, tensor: Tensor, loaded: _Loaded, names: Mapping[str, str]) -> str | None:
    """The module that has a key's values now. For names that it does not know, diffusers makes an adapter and leaves
    its start in it; older names, such as ``lora.down``, it understands.

    Args:
        names: the modules that have an adapter, by their kohya form.
    """
    if not key.startswith(PREFIX):
        return None
    part, module, _, _ = meaning_of(key, names)
    own = key.removeprefix(PREFIX)
    value = loaded.tensors.get(own if own in loaded.tensors else f"{module}.lora_{part}.weight")
    if value is None or value.shape != tensor.shape:
        return None
    if part == "unknown":  # of another kind of adapter, whose names are peft's own
        return _module_of(own)
    factor = loaded.strengths[module] if part == "B" else 1.0
    value, own_value = value.float(), tensor.float() if factor == 1 else tensor.float() * factor
    is_there = torch.equal(value, own_value) or torch.allclose(value, own_value, equal_nan=True)  # the first is faster
    return module if is_there else None


class _Loaded(NamedTuple):
    tensors: dict[str, Tensor]
    strengths: dict[str, float]
    error: str | None


def load_by_diffusers(
    path: Path, transformer: Kandinsky5Transformer3DModel, call: str = BY_PIPELINE, *, only_from_file: bool = False
) -> tuple[dict[str, Tensor], str | None]:
    """What diffusers would load into a transformer.

    Args:
        call: ``BY_PIPELINE`` or ``BY_TRANSFORMER``.
        only_from_file: what the file does not have stays on the meta device and is not drawn first, which takes most of
            the time. ``load_lora_weights`` does so unless it is told otherwise; ``load_lora_adapter`` does not.

    Returns:
        ``<module>.lora_{A,B}.weight``, ``<module>.lora_magnitude_vector``, ``<module>.lokr_w1`` and so on, with the
        strength folded into ``lora_B`` or ``lokr_w1``; and the error that diffusers raises, or None.
    """
    tensors, _, error = _load(path, transformer, call, only_from_file)
    return tensors, error


def _load(path: Path, transformer: Kandinsky5Transformer3DModel, call: str, only_from_file: bool = False) -> _Loaded:
    from diffusers.utils import logging

    _move_off_meta(transformer)
    load: Callable[[Path, Kandinsky5Transformer3DModel, bool], None] = (
        _load_as_pipeline if call == BY_PIPELINE else _load_as_transformer
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the report says what it would warn of
    try:
        with warnings.catch_warnings(action="ignore"):
            load(path, transformer, only_from_file)
        return _Loaded(_loaded_tensors(transformer), _strengths(transformer), None)
    except Exception as error:  # whatever it is, a user of the file would get it too
        if "size mismatch" in str(error):
            return _Loaded({}, {}, OTHER_MODEL)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _Loaded({}, {}, f"{type(error).__name__}: {first_line[:160]}")
    finally:
        logging.set_verbosity(verbosity)
        transformer.unload_lora()


def _load_as_pipeline(path: Path, transformer: Kandinsky5Transformer3DModel, only_from_file: bool) -> None:
    """Do what ``load_lora_weights`` of ``Kandinsky5T2IPipeline`` does, without a pipeline and its encoders."""
    from diffusers.loaders import KandinskyLoraLoaderMixin as Mixin

    state, metadata = Mixin.lora_state_dict(str(path), return_lora_metadata=True)
    if not all("lora" in key for key in state):
        raise ValueError("Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring.")
    Mixin.load_lora_into_transformer(
        state, transformer, adapter_name=_CHECKED, metadata=metadata, low_cpu_mem_usage=only_from_file
    )


def _load_as_transformer(path: Path, transformer: Kandinsky5Transformer3DModel, only_from_file: bool) -> None:
    transformer.load_lora_adapter(
        str(path), prefix="transformer", adapter_name=_CHECKED, low_cpu_mem_usage=only_from_file
    )


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


def _strengths(transformer: torch.nn.Module) -> dict[str, float]:
    """What diffusers multiplies the product of each adapted module with."""
    scalings = ((name, getattr(layer, "scaling", {})) for name, layer in transformer.named_modules())
    return {name: float(scaling[_CHECKED]) for name, scaling in scalings if _CHECKED in scaling}


def _module_of(key: str) -> str:
    return re.split(r"\.(?:lora|lokr|hada)_", key)[0]


def _move_off_meta(transformer: torch.nn.Module) -> None:
    """Give linears weights on the CPU that take no memory: peft creates an adapter on its linear's device, and on the
    meta device nothing would be loaded."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_meta:
            shape = module.weight.shape
            module.weight = torch.nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


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
    with one_thread():
        expected = {key.removeprefix(PREFIX): tensor for key, tensor in lora_state_dict(transformer).items()}
        loaded, error = load_by_diffusers(path, empty, call, only_from_file=call == BY_PIPELINE)
        different = [key for key, tensor in expected.items() if not _is(loaded.get(key), tensor)]
    if error or different or len(loaded) != len(expected):
        reason = error or f"{len(different) or len(loaded) - len(expected)} of {len(expected)} tensors differ"
        raise RunError(
            f"diffusers does not load {path} as it was trained: {reason}",
            "Keep the file and report this; `k5train check-lora` shows what is loaded",
        )


def _is(loaded: Tensor | None, expected: Tensor) -> bool:
    return loaded is not None and not loaded.is_meta and torch.equal(loaded.float(), expected)
