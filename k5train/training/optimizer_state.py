"""How is an optimizer's state saved and restored, bit for bit? As named tensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any torch optimizer: tensors by name, in host memory, and the rest as JSON.

    Nothing is copied on the GPU, where a captured step holds all that is not the optimizer's.

    Args:
        names: names of the parameters, in the optimizer's order.
    """
    document = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state = {names[i]: _take_tensors(values, names[i], tensors) for i, values in document["state"].items()}
    groups = [
        _take_tensors({**group, "lr": float(group["lr"])}, f"group/{i}", tensors)
        for i, group in enumerate(document["param_groups"])
    ]
    return tensors, {"state": state, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """The inverse of ``optimizer_state``. Restores into an optimizer made by the same recipe."""
    document = optimizer.state_dict()
    state = {names.index(name): _put_tensors(values, name, tensors) for name, values in plain["state"].items()}
    saved = [_put_tensors(group, f"group/{i}", tensors) for i, group in enumerate(plain["groups"])]
    groups = [_group(new, old) for new, old in zip(document["param_groups"], saved, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _group(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group of parameters, for an optimizer that keeps its rate where it kept it when it was made.

    How a step is launched is not part of the state: another device or version does it in its own way.
    """
    own = {name: new[name] for name in ("capturable", "fused", "foreach") if name in new}
    rate = torch.full_like(new["lr"], old["lr"]) if isinstance(new["lr"], Tensor) else old["lr"]
    return {**new, **_like(new, old), **own, "lr": rate}


def _take_tensors(values: Mapping[str, Any], where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``values`` with None in place of tensors, which go into ``tensors``. bitsandbytes nests dicts in its state."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            # Copied also on a CPU: safetensors refuses tensors that share memory.
            tensors[f"{where}/{key}"] = value.detach().to("cpu", copy=True)
        plain[key] = (
            None if isinstance(value, Tensor)
            else _take_tensors(value, f"{where}/{key}", tensors) if isinstance(value, dict)
            else value
        )  # fmt: skip
    return plain


def _put_tensors(plain: Mapping[str, Any], where: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of ``_take_tensors``."""
    return {
        key: _put_tensors(value, f"{where}/{key}", tensors) if isinstance(value, dict)
        else tensors.get(f"{where}/{key}", value)
        for key, value in plain.items()
    }  # fmt: skip


def _like(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists back into tuples where a new optimizer has tuples, which JSON does not have."""
    return {k: tuple(v) if isinstance(new.get(k), tuple) and isinstance(v, list) else v for k, v in old.items()}
