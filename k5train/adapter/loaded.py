"""May a LoRA file be drawn with, and how is it on a transformer for a while: loaded, at a strength, removed again?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import Kandinsky5Transformer3DModel

from k5cache.shared.errors import RunError
from k5cache.shared.units import count_of
from k5train.adapter.attach import ADAPTER, adapted_layers
from k5train.adapter.files import load_lora
from k5train.adapter.keys import kind_of
from k5train.adapter.lora_file import read_file, refuse_not_finite
from k5train.adapter.pairs import understand
from k5train.adapter.targets import linear_sizes
from k5train.adapter.vetted import refuse_harmful
from k5train.adapter.who_loads import by_diffusers, call_for

KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}


def vet(path: Path, empty: Kandinsky5Transformer3DModel) -> str:
    """Whether ``loaded`` can load a file, whoever wrote it, before the transformer itself is loaded.

    Args:
        empty: the architecture without weights.

    Returns:
        its kind: ``lora``, ``dora`` or ``lokr``.

    Raises:
        RunError: the file cannot be read as an adapter of this model, diffusers would load only a part of it, or it
            must not be given to diffusers.
    """
    state, metadata = read_file(path)
    kind = kind_of(state)
    if kind not in ("dora", "lokr"):
        understand(path, state, metadata, linear_sizes(empty))
        return kind
    # diffusers itself loads these.
    refuse_not_finite(path, state)
    refuse_harmful(path, state, metadata)
    program = by_diffusers(path, state, empty, call_for(kind))
    if not program.loads_all:
        reason = program.error or f"it ignores {len(program.unused)} of its {count_of(len(state), 'tensor')}"
        raise RunError(
            f"{path} is a {KINDS[kind]} that diffusers does not load as it is: {reason}",
            "Give a file of `k5train run`; `k5train check-lora` says which programs load this one",
        )
    return kind


@contextmanager
def loaded(transformer: Kandinsky5Transformer3DModel, path: Path) -> Iterator[None]:
    """Have a LoRA file on a transformer that has no adapter. Afterwards every bit of the transformer is as before.

    Raises:
        RunError: as ``vet``.
    """
    try:
        load_lora(transformer, path)
        yield
    finally:
        if getattr(transformer, "_hf_peft_config_loaded", False):
            transformer.unload_lora()


def set_strength(transformer: Kandinsky5Transformer3DModel, strength: float) -> None:
    """Have the adapter act at a strength, as diffusers' ``set_adapters`` does it.

    LoRA and LoKr change each weight by ``strength`` times what they are. A DoRA's matrices are scaled, and its
    magnitudes are not, so that at 0 it is not the base model.
    """
    for _, layer in adapted_layers(transformer):
        layer.set_scale(ADAPTER, strength)
