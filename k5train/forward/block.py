"""The lean blocks: diffusers' two transformer blocks as pure functions of tensors: they compile once, and stream.

``tests/test_execute.py`` holds them to diffusers' own modules, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5AttnProcessor,
    Kandinsky5TransformerDecoderBlock,
    Kandinsky5TransformerEncoderBlock,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from k5train.base.linear import Int8Linear
from k5train.forward.attention import any_attention, attention, fits
from k5train.forward.ops import linear


class Linears(NamedTuple):
    """One frozen linear, or several that share an input, with their adapters."""

    weight: Tensor
    """``[N, K]``: int8, or the compute dtype."""
    scale: Tensor | None
    """``[N, 1]`` of an int8 weight."""
    bias: Tensor | None
    downs: tuple[Tensor, ...]
    """``lora_A`` of each, ``[R, K]`` float32; empty: no adapter."""
    ups: tuple[Tensor, ...]
    """``lora_B`` of each, ``[N / len, R]`` float32."""
    scaling: float | Tensor
    """alpha / rank; once gathered a tensor, so that no other value needs another compilation."""
    dropout: float


class Attention(NamedTuple):
    """Self attention has ``qkv``; cross attention has ``q``, and ``kv`` on the caption."""

    projections: tuple[tuple[Linears, ...], ...]
    """Of the queries' input and, in cross attention, of the caption. Linears that cannot be fused stand apart."""
    query_norm: Tensor
    key_norm: Tensor
    out: Linears


class Block(NamedTuple):
    """What a block multiplies with, apart from its modulation. ``cross_attention`` is None in a text block."""

    self_attention: Attention
    cross_attention: Attention | None
    ff_in: Linears
    ff_out: Linears


class Modes(NamedTuple):
    """How a block computes. Constants to the compiler."""

    int8_dynamic: bool
    cudnn: bool
    """Attention over the picture by cuDNN: faster than flash attention on Hopper."""
    flash: bool = True
    """Attention without a mask by ``attention.attention``; else as torch chooses."""


def run_block(
    x: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    modulation: Tensor,
    rope: Tensor,
    block: Block,
    modes: Modes,
) -> Tensor:
    """A visual block, or with ``text = None`` a text block.

    Args:
        x: ``[B, N, D]`` tokens.
        text: ``[B, L, D]``, what the picture attends to.
        mask: ``[B, 1, 1, L]`` bool, which of the captions' tokens are attended to. None: all.
        modulation: ``[B, 9 * D]`` float32, ``[B, 6 * D]`` in a text block: shift, scale and gate of each part.
        rope: ``[1, N, 1, head / 2, 2, 2]`` float32.
    """
    parts = modulation.unsqueeze(1).chunk(2 if text is None else 3, dim=-1)
    shift, scale, gate = parts[0].chunk(3, dim=-1)
    own_mask = mask if text is None else None  # pad tokens are the caption's: its keys in a text block
    out = attend(modulate(x, shift, scale), None, own_mask, rope, block.self_attention, modes, "self")
    x = (x.float() + gate * out.float()).type_as(x)
    if text is not None and block.cross_attention is not None:
        shift, scale, gate = parts[1].chunk(3, dim=-1)
        out = attend(modulate(x, shift, scale), text, mask, None, block.cross_attention, modes, "cross")
        x = (x.float() + gate * out.float()).type_as(x)
    shift, scale, gate = parts[-1].chunk(3, dim=-1)
    hidden = F.gelu(project(modulate(x, shift, scale), block.ff_in, modes, "ff_in"))
    out = project(hidden, block.ff_out, modes, "ff_out")
    return (x.float() + gate * out.float()).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, scaled and shifted in float32, back in x's dtype."""
    return (F.layer_norm(x.float(), x.shape[-1:]) * (scale + 1.0) + shift).type_as(x)


def attend(
    x: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    rope: Tensor | None,
    part: Attention,
    modes: Modes,
    tag: str,
) -> Tensor:
    """One attention with its projections; keys and values from ``text`` where it is given."""
    if text is None:
        query, key, value = projections(x, part.projections[0], modes, f"{tag}_qkv").chunk(3, dim=-1)
    else:
        query = projections(x, part.projections[0], modes, f"{tag}_q")
        key, value = projections(text, part.projections[1], modes, f"{tag}_kv").chunk(2, dim=-1)
    head_dim = part.query_norm.shape[0]
    query, key, value = (torch.unflatten(t, -1, (-1, head_dim)) for t in (query, key, value))
    query, key = rms_norm(query, part.query_norm), rms_norm(key, part.key_norm)
    if rope is not None:
        query, key = rotate(query, rope), rotate(key, rope)
    if mask is None and modes.flash and fits(query):
        mixed = attention(query, key, value, cudnn=modes.cudnn and text is None)
    else:
        mixed = any_attention(query, key, value, mask)
    return project(mixed.flatten(-2, -1), part.out, modes, f"{tag}_out")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """In float32, as ``Kandinsky5AttnProcessor``: ``query_norm(query.float()).type_as(query)``."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)
    return (y * weight.float()).type_as(x)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE on ``[B, N, heads, head]``; diffusers rounds the result to bfloat16 whatever x is."""
    pairs = torch.unflatten(x.float(), -1, (-1, 1, 2))
    return (rope * pairs).sum(dim=-1).flatten(-2, -1).to(torch.bfloat16).type_as(x)


def projections(x: Tensor, parts: tuple[Linears, ...], modes: Modes, tag: str) -> Tensor:
    """Several linears of one input, fused as far as they could be, side by side in the last dimension."""
    outs = [project(x, part, modes, tag) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def project(x: Tensor, part: Linears, modes: Modes, tag: str) -> Tensor:
    """One fused linear. With dropout its adapter sees another input than the weight, so it is added from outside."""
    down = up = None
    if part.downs:
        down = torch.cat([(d * part.scaling).to(x.dtype) for d in part.downs])
        up = torch.cat([u.to(x.dtype) for u in part.ups])
    dropout = part.dropout if part.downs else 0.0
    fused = dropout == 0.0
    out = linear(
        x, part.weight, part.scale, part.bias, down if fused else None, up if fused else None,
        max(1, len(part.downs)), modes.int8_dynamic and part.weight.dtype == torch.int8, tag,
    )  # fmt: skip
    if not fused and down is not None and up is not None:
        out = out + F.dropout(x, dropout) @ down.t() @ up.t()
    return out


def gather(block: nn.Module, dropout: bool) -> Block | None:
    """What ``run_block`` needs of one of diffusers' blocks, fusing the int8 weights that share an input in place.

    Args:
        dropout: the adapters' dropout is on: a training step.

    Returns:
        None for a block that holds something this file does not know: a changed processor, another kind of adapter,
        several adapters at once. It then runs as the module it is.
    """
    if not isinstance(block, Kandinsky5TransformerEncoderBlock | Kandinsky5TransformerDecoderBlock):
        return None
    attentions = [block.self_attention]
    attentions += [block.cross_attention] if isinstance(block, Kandinsky5TransformerDecoderBlock) else []
    gathered = [_attention(attention, dropout, cross=i == 1) for i, attention in enumerate(attentions)]
    ff_in, ff_out = (_linears([m], dropout) for m in (block.feed_forward.in_layer, block.feed_forward.out_layer))
    if any(g is None for g in gathered) or ff_in is None or ff_out is None:
        return None
    first = gathered[0]
    assert first is not None
    return Block(first, gathered[1] if len(gathered) > 1 else None, ff_in[0], ff_out[0])


def adapter_state(block: Any) -> tuple[Any, ...]:
    """What ``gather`` found depends on: equal as long as the same adapters are there, on or off."""
    attentions = [block.self_attention] + ([block.cross_attention] if hasattr(block, "cross_attention") else [])
    linears = [m for a in attentions for m in (a.to_query, a.to_key, a.to_value, a.out_layer)]
    linears += [block.feed_forward.in_layer, block.feed_forward.out_layer]
    return tuple(
        (id(m), m.disable_adapters, m.merged, tuple(m.active_adapters)) if isinstance(m, BaseTunerLayer) else id(m)
        for m in linears
    )


def _attention(module: Kandinsky5Attention, dropout: bool, cross: bool) -> Attention | None:
    if type(module.processor) is not Kandinsky5AttnProcessor:
        return None
    query, key, value = module.to_query, module.to_key, module.to_value
    inputs = [[query], [key, value]] if cross else [[query, key, value]]
    parts = [_linears(members, dropout) for members in inputs]
    out = _linears([module.out_layer], dropout)
    if out is None or any(p is None for p in parts):
        return None
    return Attention(
        tuple(p for p in parts if p is not None), module.query_norm.weight, module.key_norm.weight, out[0]
    )  # fmt: skip


def _linears(modules: Sequence[nn.Module], dropout: bool) -> tuple[Linears, ...] | None:
    """The linears of one input: one fused if their adapters allow it, else each for itself, None if one is unknown."""
    alone = [_one(m, dropout) for m in modules]
    known = [a for a in alone if a is not None]
    if len(known) < len(alone):
        return None
    if len(known) == 1 or not _can_fuse(known):
        return tuple(_as_input(k) for k in known)
    bases = [_base(m) for m in modules]
    weight, scale, bias = (_fuse(bases, name) for name in ("weight", "scale", "bias"))
    assert weight is not None
    first = known[0]
    downs, ups = (tuple(t for k in known for t in getattr(k, name)) for name in ("downs", "ups"))
    return (_as_input(Linears(weight, scale, bias, downs, ups, first.scaling, first.dropout)),)


def _as_input(part: Linears) -> Linears:
    if not part.downs:
        return part
    return part._replace(scaling=torch.as_tensor(part.scaling, dtype=torch.float32, device=part.downs[0].device))


def _can_fuse(parts: Sequence[Linears]) -> bool:
    """All int8 of one shape with a bias alike; adapters on all or none, of one rank and scaling, without dropout."""
    alike = {
        (p.weight.dtype, p.weight.shape, p.bias is None, p.scaling, tuple(d.shape for d in p.downs)) for p in parts
    }
    return len(alike) == 1 and not any(p.dropout for p in parts) and parts[0].scale is not None


def _one(module: nn.Module, dropout: bool) -> Linears | None:
    base = _base(module)
    if type(base) not in (nn.Linear, Int8Linear):
        return None
    weight, scale, bias = base.weight, getattr(base, "scale", None), base.bias
    plain = Linears(weight, scale, bias, (), (), 1.0, 0.0)
    if module is base:
        return plain
    layer: Any = module
    if type(layer) is not LoraLinear or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if layer.disable_adapters or name not in layer.lora_A:
        return plain
    if layer.use_dora.get(name) or layer.lora_bias.get(name) or getattr(layer, "lora_variant", {}).get(name):
        return None
    rate = getattr(layer.lora_dropout[name], "p", 0.0) if dropout else 0.0
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return plain._replace(downs=(down,), ups=(up,), scaling=float(layer.scaling[name]), dropout=float(rate))


def _base(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, LoraLinear) else module


def _fuse(modules: Sequence[Any], name: str) -> Tensor | None:
    """The modules' tensors one under the other; from then on theirs are views of it, so nothing is held twice."""
    tensors: list[Tensor | None] = [getattr(m, name) for m in modules]
    if any(t is None for t in tensors):
        return None
    held = [t.detach() for t in tensors if t is not None]
    size, first = held[0].shape[0], held[0]
    bytes_each = first.numel() * first.element_size()
    if all(
        t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and t.data_ptr() == first.data_ptr() + i * bytes_each
        and t.is_contiguous()
        for i, t in enumerate(held)
    ):  # fused before
        return first.as_strided((size * len(held), *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat(held)
    for i, module in enumerate(modules):
        part = whole[i * size : (i + 1) * size]
        if isinstance(getattr(module, name), nn.Parameter):
            getattr(module, name).data = part
        else:
            setattr(module, name, part)
    return whole
