"""By how much does an adapter's file change each weight? One module at a time, so that little is in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k5train.adapter.keys import kind_of
from k5train.adapter.lora_file import read_names, read_some
from k5train.adapter.other_kinds import MAGNITUDE, dora_for, factor_keys, lokr_for, magnitudes_of
from k5train.adapter.pairs import Sizes, keys_by_module, refuse_kind, understand


@dataclass(frozen=True)
class Adapter:
    """An adapter's file whose keys are understood, and whose tensors are read when they are needed."""

    path: Path
    kind: str
    """``lora``, ``dora`` or ``lokr``."""
    keys: Mapping[str, tuple[str, ...]]
    """Module -> its keys in the file."""
    metadata: Mapping[str, str]
    sizes: Sizes
    strength: float
    left_out: tuple[str, ...]
    """Keys of text encoders."""

    def change(self, module: str, weight: Tensor) -> Tensor:
        """What the adapter adds to a module's weight at its strength, as peft computes it.

        A LoRA adds ``B A`` and a LoKr ``kron(w1, w2)``, times the strength. A DoRA scales each row of ``W + B A`` to
        its magnitude, and the strength is that of ``B A``.

        Args:
            weight: of the base, ``[out, in]`` float32.

        Raises:
            RunError: the file is unclear, incomplete or not of this model at this module.
        """
        parts = self.parts(module)
        if self.kind == "lokr":
            return torch.kron(_factor(parts, "lokr_w1") * self.strength, _factor(parts, "lokr_w2"))
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        if self.kind == "lora":
            return (up * self.strength) @ down
        changed = torch.addmm(weight, up, down, alpha=self.strength)
        scale = parts[MAGNITUDE] / changed.norm(dim=1)
        return changed.mul_(scale[:, None]).sub_(weight)

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module in float32, by diffusers' names for them, the file's strength in one of them.

        Raises:
            RunError: as ``change``.
        """
        state = read_some(self.path, self.keys[module])
        if self.kind == "lora":
            down, up = understand(self.path, state, self.metadata, self.sizes).pairs[module]
            return {"lora_A.weight": down, "lora_B.weight": up}
        if self.kind == "lokr":
            named = lokr_for("diffusers", self.path, state, self.sizes)
        else:
            named = dora_for("diffusers", self.path, state, self.metadata, self.sizes, None)
        return {key.removeprefix(f"transformer.{module}."): tensor for key, tensor in named.items()}


def _factor(parts: Mapping[str, Tensor], key: str) -> Tensor:
    return parts[key] if key in parts else parts[f"{key}_a"] @ parts[f"{key}_b"]


def open_adapter(path: Path, sizes: Sizes, strength: float) -> Adapter:
    """Understand the keys of an adapter's file, from any trainer.

    Args:
        sizes: outputs and inputs of every linear of the transformer.

    Raises:
        RunError: it cannot be read as a LoRA, a DoRA or a LoKr of this model.
    """
    names, metadata = read_names(path)
    kind = kind_of(names)
    left_out: tuple[str, ...] = ()
    keys: dict[str, tuple[str, ...]]
    if kind == "lokr":
        keys = {module: tuple(parts.values()) for module, parts in factor_keys(path, names, sizes).items()}
    else:
        magnitudes, matrices = magnitudes_of(path, names, sizes) if kind == "dora" else ({}, names)
        refuse_kind(path, matrices)
        by_module, left_out = keys_by_module(path, matrices, sizes)
        keys = {module: tuple(parts.values()) for module, parts in by_module.items()}
        for module, key in magnitudes.items():
            keys[module] = (*keys.get(module, ()), key)
    return Adapter(path, kind, keys, metadata, sizes, strength, left_out)


def check_tensors(adapter: Adapter) -> None:
    """Read every tensor once, so that nothing is written for a file that is unclear in its last module.

    Raises:
        RunError: as ``Adapter.change``.
    """
    for module in adapter.keys:
        adapter.parts(module)
