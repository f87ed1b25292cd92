"""How do captions of different lengths share a forward pass? A mask keeps pad tokens out of every attention.

diffusers' ``Kandinsky5AttnProcessor`` takes no mask, so its two blocks are written out here with one: no token attends
to pad tokens, neither the caption's (text blocks) nor the picture's (cross attention). Everything else in a block works
on each token by itself. ``tests/test_parity_masks.py`` compares a masked batch with its rows one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from k5train.forward.attention import length_mask


class Padding:
    """Which tokens of padded captions are padding.

    Args:
        lengths: tokens of each caption, from 1 to ``num_tokens``. A tensor ``[B]`` int32 on ``device`` is not checked.
        num_tokens: L, the length of the padded captions.

    Raises:
        ValueError: a length is out of range. A caption without tokens would attend to nothing, which gives NaN.
    """

    def __init__(self, lengths: Sequence[int] | Tensor, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        if isinstance(lengths, Tensor):  # never read here: a captured pass has other lengths each time
            self.lengths = lengths
            return
        if not all(0 < length <= num_tokens for length in lengths):
            raise ValueError(f"text_lengths must each be 1 to {num_tokens}, found {list(lengths)}")
        self.lengths = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)

    @functools.cached_property
    def mask(self) -> Tensor:
        """``[B, 1, 1, L]`` bool for attention over ``[B, heads, queries, keys]``; True: attended to."""
        return length_mask(self.lengths, self.num_tokens)


class MaskedTextBlock:
    """A ``Kandinsky5TransformerEncoderBlock`` that is called with the same arguments and attends to no padding."""

    def __init__(self, block: nn.Module, padding: Padding) -> None:
        self.block: Any = block
        self.padding = padding

    def __call__(self, x: Tensor, time_embed: Tensor, rope: Tensor) -> Tensor:
        block = self.block
        attention, feed_forward = block.text_modulation(time_embed).unsqueeze(1).chunk(2, dim=-1)
        out = _modulate(block.self_attention_norm, x, attention)
        x = _gate(x, _attend(block.self_attention, out, out, rope, self.padding.mask), attention)
        out = block.feed_forward(_modulate(block.feed_forward_norm, x, feed_forward))
        return _gate(x, out, feed_forward)


class MaskedVisualBlock:
    """A ``Kandinsky5TransformerDecoderBlock`` that is called with the same arguments and masks the caption."""

    def __init__(self, block: nn.Module, padding: Padding) -> None:
        self.block: Any = block
        self.padding = padding

    def __call__(self, x: Tensor, text: Tensor, time_embed: Tensor, rope: Tensor, sparse_params: None) -> Tensor:
        block = self.block
        own, cross, feed_forward = block.visual_modulation(time_embed).unsqueeze(1).chunk(3, dim=-1)
        out = block.self_attention(_modulate(block.self_attention_norm, x, own), rotary_emb=rope)
        x = _gate(x, out, own)
        out = _modulate(block.cross_attention_norm, x, cross)
        x = _gate(x, _attend(block.cross_attention, out, text, None, self.padding.mask), cross)
        out = block.feed_forward(_modulate(block.feed_forward_norm, x, feed_forward))
        return _gate(x, out, feed_forward)


def _modulate(norm: nn.Module, x: Tensor, parameters: Tensor) -> Tensor:
    """Norm, scale and shift in float32, back in x's dtype. ``parameters``: shift, scale and gate, side by side."""
    shift, scale, _ = parameters.chunk(3, dim=-1)
    return (norm(x.float()) * (scale.float() + 1.0) + shift.float()).type_as(x)


def _gate(x: Tensor, out: Tensor, parameters: Tensor) -> Tensor:
    gate = parameters.chunk(3, dim=-1)[2]
    return (x.float() + gate.float() * out.float()).type_as(x)


def _attend(attention: Any, x: Tensor, keys: Tensor, rope: Tensor | None, mask: Tensor) -> Tensor:
    """``Kandinsky5AttnProcessor`` with a mask: queries from ``x``, keys and values from ``keys``, masked."""
    query, key, value = (
        projection(tokens).unflatten(-1, (attention.num_heads, -1))
        for projection, tokens in ((attention.to_query, x), (attention.to_key, keys), (attention.to_value, keys))
    )
    query = attention.query_norm(query.float()).type_as(query)
    key = attention.key_norm(key.float()).type_as(key)
    if rope is not None:
        query, key = (_rotate(t, rope).type_as(t) for t in (query, key))
    processor = attention.processor
    out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=processor._attention_backend)
    mixed: Tensor = attention.out_layer(out.flatten(-2, -1))
    return mixed


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE. diffusers rounds the result to bfloat16, whatever dtype x has."""
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2).to(torch.float32)
    return (rope * pairs).sum(dim=-1).reshape(*x.shape).to(torch.bfloat16)
