"""A transformer with random weights, for measurements that need no checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from k5train.base.quantize import INT8_MODULES, Precision, empty_transformer, finish, place


def random_transformer(
    config: dict[str, Any], precision: Precision, device: torch.device, streamed: frozenset[int] = frozenset()
) -> Any:
    """A transformer like that of ``load_transformer``, with random weights.

    Args:
        config: the transformer's config.json.
        streamed: visual blocks whose int8 weights go to host memory.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / "transformer").mkdir()
        (Path(folder) / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        transformer = empty_transformer(Path(folder))
    prefixes = tuple(f"visual_transformer_blocks.{i}." for i in streamed)
    for name, tensor in _random_tensors(transformer, precision, device):
        parent = name.rpartition(".")[0]
        on_host = bool(prefixes) and name.startswith(prefixes) and INT8_MODULES.fullmatch(parent)
        place(transformer, name, tensor.cpu() if on_host else tensor)
    return finish(transformer, device)


def _random_tensors(transformer: nn.Module, precision: Precision, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Weights of a size that keeps activations near 1. Modulations are random too, or blocks would be identities."""
    generator = torch.Generator(device).manual_seed(0)
    for name, meta in transformer.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        shape = tuple(meta.shape)
        if leaf == "weight" and precision != "no_change" and INT8_MODULES.fullmatch(parent):
            yield name, torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
            yield f"{parent}.scale", torch.full((shape[0], 1), 1 / (73 * shape[1] ** 0.5), device=device).bfloat16()
        elif len(shape) == 1 and leaf == "weight":
            yield name, torch.ones(shape, device=device, dtype=torch.bfloat16)
        else:
            std = 0.02 if "modulation" in name or len(shape) == 1 else shape[1] ** -0.5
            yield name, (torch.randn(shape, device=device, generator=generator) * std).bfloat16()
