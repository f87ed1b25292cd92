"""What the tests of the forward pass share: the toy transformer with an adapter, a batch, and what a step gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from k5train.adapter import attach
from k5train.base.quantize import load_transformer
from k5train.forward import stream
from k5train.forward.block import Modes
from k5train.forward.execute import Execution
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.planning.memory import Plan, Streaming

CPU = torch.device("cpu")
PLAIN = Modes(int8_dynamic=False, cudnn=False)
# diffusers rounds rotated queries and keys to bfloat16, so float32 noise before that may flip a bit worth 2^-8.
WITHIN = 2e-3


def model(folder: Path, precision: Any = "int8-quanto", **adapter: Any) -> Any:
    """The toy transformer in float32 with an adapter in which every matrix has a gradient."""
    return adapt(load_transformer(folder, precision, torch.float32, CPU), **adapter)


def adapt(transformer: Any, targets: tuple[str, ...] = ("official",), dropout: float = 0.0, rank: int = 4) -> Any:
    """Add an adapter in which every matrix has a gradient, always the same."""
    attach.add_lora(transformer, LoraConfig(rank=rank, alpha=8, targets=targets, dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return transformer.train()


def batch(transformer: nn.Module, tokens: int = 7, side: int = 8, size: int = 2) -> tuple[torch.Tensor, ...]:
    """Random latents, sigmas, prompt embeddings and pooled projections, always the same."""
    g = torch.Generator().manual_seed(1)
    config: Any = transformer.config
    return (
        torch.randn(size, 1, side, side, config.in_visual_dim, generator=g),
        torch.rand(size, generator=g),
        torch.randn(size, tokens, config.in_text_dim, generator=g),
        torch.randn(size, config.in_text_dim2, generator=g),
    )


def outcome(transformer: Any, policies: Any, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The velocity and every gradient of the adapter."""
    transformer.zero_grad()
    velocity = predict_velocity(transformer, *inputs, block_policies=policies)
    velocity.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach(), **grads}


def eager_execution(
    transformer: Any, level: str = "nothing", streaming: Streaming | None = None, modes: Modes = PLAIN
) -> Execution:
    """The blocks set up by a plan of one level for all of them, not compiled."""
    count = len(transformer.visual_transformer_blocks)
    plan = Plan((level,) * count, streaming, {}, None, 0)  # type: ignore[arg-type]
    streamer = None
    if streaming:
        blocks = transformer.visual_transformer_blocks
        streamer = stream.Streamer([blocks[i] for i in stream.spread(count, streaming.num_blocks)], streaming, CPU)
    return Execution(transformer, plan, modes, compiled=False, device=CPU, streamer=streamer)


def assert_same(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], within: float) -> None:
    assert ours.keys() == plain.keys()
    for name in plain:
        difference = (ours[name] - plain[name]).norm() / plain[name].norm()
        assert difference <= within, (name, difference.item())
