"""What velocity does the transformer predict? diffusers' own blocks, run one by one by policies that are arguments.

``predict_velocity`` computes bit for bit what ``Kandinsky5Transformer3DModel`` computes when ``Kandinsky5T2IPipeline``
or ``Kandinsky5I2IPipeline`` calls it; ``tests/test_parity_step.py`` and ``tests/test_parity_edit.py`` compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers.transformer_kandinsky import fractal_flatten, fractal_unflatten
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from k5train.forward import routing
from k5train.forward.masked import MaskedTextBlock, MaskedVisualBlock, Padding

ROPE_SCALE = (1.0, 1.0, 1.0)  # Kandinsky5T2IPipeline; the video models use (1, 2, 2)
BlockPolicy = Callable[..., Tensor]
"""How one block is run: a function of the block and its arguments that returns the block's output."""


def keep(block: nn.Module, *args: Any) -> Tensor:
    """Run a block and keep all that its backward pass needs: the fastest way, and the largest."""
    output: Tensor = block(*args)
    return output


def recompute(block: nn.Module, *args: Any) -> Tensor:
    """Run a block, keep only its inputs, and run it again in the backward pass."""
    if not torch.is_grad_enabled():
        return keep(block, *args)
    output: Tensor = checkpoint(block, *args, use_reentrant=False)
    return output


def predict_velocity(
    transformer: Kandinsky5Transformer3DModel,
    latents: Tensor,
    sigma: Tensor,
    prompt_embeds: Tensor,
    pooled_projections: Tensor,
    *,
    condition: Tensor | None = None,
    text_lengths: Sequence[int] | Tensor | None = None,
    routes: Sequence[routing.Route] = (),
    gradient_checkpointing: bool = False,
    block_policies: Sequence[BlockPolicy] | None = None,
) -> Tensor:
    """The velocity that the transformer predicts.

    Args:
        transformer: from ``load_transformer`` or from diffusers, with or without an adapter.
        latents: ``[B, 1, H, W, 16]`` noisy latents, H and W even (pixels / 8).
        sigma: ``[B]`` float32 in [0, 1].
        prompt_embeds: ``[B, L, D]``. The transformer has no text mask and would attend to padding. So either all
            captions of the batch have L tokens, or ``text_lengths`` has the length of each.
        pooled_projections: ``[B, 768]``.
        condition: ``[B, 1, H, W, 17]``: the source's latents and the mask channel, which a transformer that edits
            images sees behind the noisy latents. None: the transformer makes pictures from captions alone.
        text_lengths: tokens of each caption. The rest of ``prompt_embeds`` is padding and is masked out of every
            attention (``masked.py``): policies then get blocks that know the padding. None: every caption has L tokens.
            A tensor, ``[B]`` int32 on the device of the others, is never read on the host nor checked: each is 1 to L.
        routes: TREAD's routes, in training only: which visual tokens go through which blocks.
        gradient_checkpointing: ``recompute`` every block, otherwise ``keep``. Without effect if there are policies.
        block_policies: one policy for each block, text blocks first. None: those of ``use_policies``, if it was called
            for this transformer.

    Returns:
        velocity, ``[B, 1, H, W, 16]`` in the transformer's dtype.

    Raises:
        ValueError: the shapes do not fit together, positions are beyond the RoPE tables, or lengths do not fit.
    """
    _check_shapes(transformer, latents, sigma, prompt_embeds, pooled_projections)
    _check_channels(transformer, latents, condition)
    text_blocks: Sequence[Any] = transformer.text_transformer_blocks
    visual_blocks: Sequence[Any] = transformer.visual_transformer_blocks
    if text_lengths is not None and (isinstance(text_lengths, Tensor) or set(text_lengths) != {prompt_embeds.shape[1]}):
        if len(text_lengths) != len(prompt_embeds):
            raise ValueError(f"captions under a mask need one length each, found {list(text_lengths)}")
        padding = Padding(text_lengths, prompt_embeds.shape[1], prompt_embeds.device)
        text_blocks = [MaskedTextBlock(block, padding) for block in text_blocks]
        visual_blocks = [MaskedVisualBlock(block, padding) for block in visual_blocks]
    num_blocks = len(text_blocks) + len(visual_blocks)
    policies = (
        block_policies or _policies.get(transformer) or [recompute if gradient_checkpointing else keep] * num_blocks
    )
    if len(policies) != num_blocks:
        raise ValueError(f"block_policies has {len(policies)} entries, the transformer {num_blocks} blocks")

    dtype = compute_dtype(transformer)
    text = transformer.text_embeddings(prompt_embeds.to(dtype))
    time = transformer.time_embeddings((1000 * sigma).to(dtype))  # the pipeline too casts scheduler timesteps
    time = time + transformer.pooled_text_embeddings(pooled_projections.to(dtype))
    visual = transformer.visual_embeddings(_with_condition(latents, condition, dtype))

    grid = visual.shape[:-1]  # (B, 1, H/2, W/2)
    rope = rotary(transformer, text.shape[1], tuple(grid[1:]), visual.device)
    for block, run in zip(text_blocks, policies[: len(text_blocks)], strict=True):
        text = run(block, text, time, rope.text)

    visual, visual_rope = fractal_flatten(visual, rope.visual, grid)  # tokens: [B, N, model_dim], [1, N, 1, d/2, 2, 2]
    starts, ends = ({getattr(r, side) % len(visual_blocks): r for r in routes} for side in ("start", "end"))
    for i, (block, run) in enumerate(zip(visual_blocks, policies[len(text_blocks) :], strict=True)):
        if i in starts:
            all_visual, all_rope = visual, visual_rope
            visual, visual_rope = routing.leave(all_visual, all_rope, starts[i].kept)
        visual = run(block, visual, text, time, visual_rope, None)
        if i in ends:
            visual, visual_rope = routing.come_back(all_visual, visual, ends[i].kept), all_rope

    velocity: Tensor = transformer.out_layer(fractal_unflatten(visual, grid), text, time)
    return velocity


def use_policies(transformer: Kandinsky5Transformer3DModel, policies: Sequence[BlockPolicy]) -> None:
    """Have ``predict_velocity`` run a transformer's blocks by ``policies`` from now on, in training and sampling."""
    _policies[transformer] = policies


_policies: WeakKeyDictionary[nn.Module, Sequence[BlockPolicy]] = WeakKeyDictionary()


def compute_dtype(transformer: Kandinsky5Transformer3DModel) -> torch.dtype:
    """``transformer.dtype`` as the pipeline reads it, but without going through 3,000 parameters on every call."""
    dtype: torch.dtype = transformer.text_embeddings.in_layer.weight.dtype
    return dtype


@dataclass(frozen=True)
class Rotary:
    """The float32 rotations of one shape: ``text [1, L, 1, d/2, 2, 2]``, ``visual [1, T, H/2, W/2, 1, d/2, 2, 2]``."""

    text: Tensor
    visual: Tensor


_MOST_SHAPES = 32  # 4 MB each at 1024x1024; a run sees 7 buckets and a few hundred caption lengths
_rotaries: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Rotary]] = WeakKeyDictionary()


def rotary(
    transformer: Kandinsky5Transformer3DModel,
    num_tokens: int,
    grid: tuple[int, ...],
    device: torch.device,
) -> Rotary:
    """RoPE at the pipeline's positions: ``arange`` along the text and along each axis of the picture.

    It has one row, which is broadcast over the batch with the same bits. Computed once for each shape.

    Args:
        num_tokens: tokens of the caption.
        grid: visual tokens along time (1 for an image), height and width (pixels / 16).
    """
    known = _rotaries.setdefault(transformer, {})
    shape = (num_tokens, grid, device)
    if shape not in known:
        if len(known) >= _MOST_SHAPES:
            del known[next(iter(known))]
        # Sampling may run in inference mode; a table from there cannot be saved for a training step's backward pass.
        with torch.inference_mode(False), torch.no_grad():
            positions = [torch.arange(n, device=device) for n in grid]
            visual = transformer.visual_rope_embeddings((1, *grid), positions, ROPE_SCALE)
            text = transformer.text_rope_embeddings(torch.arange(num_tokens, device=device)).unsqueeze(0)
        known[shape] = Rotary(text, visual)
    return known[shape]


def _with_condition(latents: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Kandinsky5I2IPipeline.prepare_latents``: the noisy latents, then the source's, then the mask channel."""
    return latents.to(dtype) if condition is None else torch.cat([latents.to(dtype), condition.to(dtype)], dim=-1)


def _check_channels(
    transformer: Kandinsky5Transformer3DModel, latents: Tensor, condition: Tensor | None
) -> None:  # fmt: skip
    """Refuse a condition that the transformer does not take, or the lack of one that it needs."""
    wanted: int = transformer.config.in_visual_dim
    own = latents.shape[-1]
    of_condition = None if condition is None else tuple(condition.shape)
    expected = (*latents.shape[:-1], wanted + 1) if transformer.visual_cond else None
    if own != wanted or of_condition != expected:
        raise ValueError(
            f"the transformer takes {wanted} channels of latents and "
            f"{'no condition' if expected is None else f'a condition {list(expected)}'}, found {own} channels and "
            f"{'no condition' if of_condition is None else f'a condition {list(of_condition)}'}"
        )


def _check_shapes(
    transformer: Kandinsky5Transformer3DModel, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, pooled: Tensor
) -> None:
    if latents.ndim != 5 or prompt_embeds.ndim != 3 or pooled.ndim != 2 or sigma.ndim != 1:
        raise ValueError(
            "expected latents [B, 1, H, W, C], sigma [B], prompt_embeds [B, L, D] and pooled_projections [B, P], found"
            f" {list(latents.shape)}, {list(sigma.shape)}, {list(prompt_embeds.shape)} and {list(pooled.shape)}"
        )
    batch = latents.shape[0]
    if {batch, sigma.shape[0], prompt_embeds.shape[0], pooled.shape[0]} != {batch}:
        raise ValueError(
            f"a batch has one size, found {batch} latents, {sigma.shape[0]} sigmas, {prompt_embeds.shape[0]} captions"
            f" and {pooled.shape[0]} pooled projections"
        )
    grid = [side / patch for side, patch in zip(latents.shape[1:4], transformer.patch_size, strict=True)]
    limits = transformer.visual_rope_embeddings.max_pos
    if any(n != int(n) for n in grid) or any(n > most for n, most in zip(grid, limits, strict=True)):
        raise ValueError(
            f"latents {list(latents.shape)} do not divide into {transformer.patch_size} patches within {limits} tokens"
        )
    if not 0 < prompt_embeds.shape[1] <= transformer.text_rope_embeddings.max_pos:
        raise ValueError(
            f"a caption has 1 to {transformer.text_rope_embeddings.max_pos} tokens, found {prompt_embeds.shape[1]}"
        )
