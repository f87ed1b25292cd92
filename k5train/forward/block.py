"""What does a lean block compute? diffusers' two transformer blocks as pure functions of tensors.

As functions they are compiled once for all blocks, and their weights can be streamed. ``tests/test_execute.py``
compares them with diffusers' own modules, forward and backward.
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
from k5train.forward.attention import any_attention, attention, fits, fits_padded
from k5train.forward.feed_forward import Part
from k5train.forward.feed_forward import feed_forward as int8_feed_forward
from k5train.forward.ops import linear
from k5train.forward.rotary import rms_norm, rotate, rotated
from k5train.forward.without_adapter import is_without_adapter


class Linears(NamedTuple):
    """One frozen linear, or several that share an input, with their LoRA."""

    weight: Tensor
    """``[N, K]``: int8, or the compute dtype."""
    scale: Tensor | None
    """``[N, 1]`` of an int8 weight."""
    bias: Tensor | None
    downs: tuple[Tensor, ...]
    """``lora_A`` of each, ``[R, K]`` float32. Empty without an adapter."""
    ups: tuple[Tensor, ...]
    """``lora_B`` of each, ``[N / len, R]`` float32."""
    scaling: float | Tensor
    """alpha / rank. ``gather`` makes it a tensor, so that another value needs no compilation."""
    dropout: float
    """Of the adapters' input, 0 outside training."""


class Attention(NamedTuple):
    """One attention's weights. Self attention projects q, k and v; cross attention q, and k and v of the caption."""

    projections: tuple[tuple[Linears, ...], ...]
    """Projections of the picture, and in cross attention of the caption. Linears that cannot be fused are separate."""
    query_norm: Tensor
    key_norm: Tensor
    out: Linears


class Block(NamedTuple):
    """A block's weights, without its modulation. ``cross_attention`` is None in a text block."""

    self_attention: Attention
    cross_attention: Attention | None
    ff_in: Linears
    ff_out: Linears


class Modes(NamedTuple):
    """How a block computes. The compiler takes these as constants."""

    int8_dynamic: bool
    """Multiply on int8 tensor cores."""
    cudnn: bool
    """Use cuDNN for attention over the picture, which is faster than flash attention on Hopper."""
    flash: bool = True
    """Use ``attention.attention`` where no caption is padded, otherwise what torch chooses."""
    padded: bool = False
    """Use it for padded captions too."""
    rows: bool = False
    """Use kernels of our own for gelu with its quantising, and for RoPE, instead of what the compiler generates."""


def run_block(
    x: Tensor,
    text: Tensor | None,
    lengths: Tensor | None,
    modulation: Tensor,
    rope: Tensor,
    block: Block,
    modes: Modes,
) -> Tensor:
    """The output of a visual block, or with ``text = None`` of a text block.

    Args:
        x: ``[B, N, D]`` tokens.
        text: ``[B, L, D]`` tokens of the captions, which the picture attends to.
        lengths: ``[B]`` int32: tokens of each caption, the first of L. The others are padding, which nothing attends
            to. None: no caption is padded.
        modulation: ``[B, 9 * D]`` float32, in a text block ``[B, 6 * D]``: shift, scale and gate of each part.
        rope: ``[1, N, 1, head / 2, 2, 2]`` float32.
    """
    parts = modulation.unsqueeze(1).chunk(2 if text is None else 3, dim=-1)
    shift, scale, gate = parts[0].chunk(3, dim=-1)
    own = lengths if text is None else None  # only captions are padded: they are keys of a text block itself
    out = attend(modulate(x, shift, scale), None, own, rope, block.self_attention, modes, "self")
    x = (x.float() + gate * out.float()).type_as(x)
    if text is not None and block.cross_attention is not None:
        shift, scale, gate = parts[1].chunk(3, dim=-1)
        out = attend(modulate(x, shift, scale), text, lengths, None, block.cross_attention, modes, "cross")
        x = (x.float() + gate * out.float()).type_as(x)
    shift, scale, gate = parts[-1].chunk(3, dim=-1)
    out = feed_forward(modulate(x, shift, scale), block.ff_in, block.ff_out, modes)
    return (x.float() + gate * out.float()).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift, in float32; the result has x's dtype."""
    return (F.layer_norm(x.float(), x.shape[-1:]) * (scale + 1.0) + shift).type_as(x)


def attend(
    x: Tensor,
    text: Tensor | None,
    lengths: Tensor | None,
    rope: Tensor | None,
    part: Attention,
    modes: Modes,
    tag: str,
) -> Tensor:
    """One attention with its projections. Keys and values come from ``text``, or from ``x`` if it is None."""
    query, key, value = heads(x, text, rope, part, modes, tag)
    if lengths is not None and modes.padded and fits_padded(query):
        mixed = attention(query, key, value, cudnn=False, lengths=lengths)
    elif lengths is None and modes.flash and fits(query):
        # cuDNN takes no caption of one token.
        mixed = attention(query, key, value, cudnn=modes.cudnn and text is None and query.shape[1] > 1)
    else:
        mixed = any_attention(query, key, value, lengths)
    return project(mixed.flatten(-2, -1), part.out, modes, f"{tag}_out")


def heads(
    x: Tensor, text: Tensor | None, rope: Tensor | None, part: Attention, modes: Modes, tag: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, N, heads, head]``, normalised and rotated."""
    if text is None:
        fused = projections(x, part.projections[0], modes, f"{tag}_qkv")
        if modes.rows and rope is not None:
            return rotated(fused, rope, part.query_norm, part.key_norm)
        query, key, value = fused.chunk(3, dim=-1)
    else:
        query = projections(x, part.projections[0], modes, f"{tag}_q")
        key, value = projections(text, part.projections[1], modes, f"{tag}_kv").chunk(2, dim=-1)
    head_dim = part.query_norm.shape[0]
    query, key, value = (torch.unflatten(t, -1, (-1, head_dim)) for t in (query, key, value))
    query, key = rms_norm(query, part.query_norm), rms_norm(key, part.key_norm)
    if rope is not None:
        query, key = rotate(query, rope), rotate(key, rope)
    return query, key, value


def feed_forward(x: Tensor, first: Linears, second: Linears, modes: Modes) -> Tensor:
    """Two linears with gelu between them."""
    parts = [_int8_part(x, part) for part in (first, second)] if modes.rows and modes.int8_dynamic else [None]
    if parts[0] is not None and parts[-1] is not None:
        return int8_feed_forward(x, parts[0], parts[-1])
    return project(F.gelu(project(x, first, modes, "ff_in")), second, modes, "ff_out")


def _int8_part(x: Tensor, part: Linears) -> Part | None:
    """A linear as ``int8_feed_forward`` takes it. None: it is not int8, or its adapter has an input of its own."""
    if part.scale is None or (part.downs and part.dropout > 0.0):
        return None
    return Part(part.weight, part.scale, part.bias, *adapter(x, part))


def projections(x: Tensor, parts: tuple[Linears, ...], modes: Modes, tag: str) -> Tensor:
    """Several linears of one input, their outputs side by side in the last dimension."""
    outs = [project(x, part, modes, tag) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def project(x: Tensor, part: Linears, modes: Modes, tag: str) -> Tensor:
    """One ``Linears``. Dropout gives the adapter an input of its own, so it is then added outside the matmul."""
    down, up = adapter(x, part)
    dropout = part.dropout if part.downs else 0.0
    is_inside = dropout == 0.0
    out = linear(
        x, part.weight, part.scale, part.bias, down if is_inside else None, up if is_inside else None,
        max(1, len(part.downs)), modes.int8_dynamic and part.weight.dtype == torch.int8, tag,
    )  # fmt: skip
    if not is_inside and down is not None and up is not None:
        out = out + F.dropout(x, dropout) @ down.t() @ up.t()
    return out


def adapter(x: Tensor, part: Linears) -> tuple[Tensor | None, Tensor | None]:
    """The adapters' projections in x's dtype, one below the other, with the strength in the first."""
    if not part.downs:
        return None, None
    down = torch.cat([(d * part.scaling).to(x.dtype) for d in part.downs])
    return down, torch.cat([u.to(x.dtype) for u in part.ups])


def gather(block: nn.Module, dropout: bool) -> Block | None:
    """The weights of one of diffusers' blocks, for ``run_block``. Fuses int8 weights that share an input, in place.

    Args:
        dropout: whether the adapters' dropout is on, as in a training step.

    Returns:
        None if the block has something that this file does not know: a changed processor, another kind of adapter,
        several adapters at once. It must then run as the module it is.
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


def bare(block: Block) -> Block:
    """The same weights without adapters."""

    def strip(part: Linears) -> Linears:
        return part._replace(downs=(), ups=(), scaling=1.0, dropout=0.0)

    def of_attention(part: Attention) -> Attention:
        projections = tuple(tuple(map(strip, parts)) for parts in part.projections)
        return part._replace(projections=projections, out=strip(part.out))

    cross = of_attention(block.cross_attention) if block.cross_attention else None
    return Block(of_attention(block.self_attention), cross, strip(block.ff_in), strip(block.ff_out))


def adapter_state(block: Any) -> tuple[Any, ...]:
    """What the result of ``gather`` depends on: it is equal as long as the same adapters are on."""
    attentions = [block.self_attention] + ([block.cross_attention] if hasattr(block, "cross_attention") else [])
    linears = [m for a in attentions for m in (a.to_query, a.to_key, a.to_value, a.out_layer)]
    linears += [block.feed_forward.in_layer, block.feed_forward.out_layer]
    return tuple(
        (id(m), _is_off(m), m.merged, tuple(m.active_adapters)) if isinstance(m, BaseTunerLayer) else id(m)
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
    """The linears of one input: fused into one if they can be, otherwise each by itself. None if one is unknown."""
    parts = [part for m in modules if (part := _linear(m, dropout)) is not None]
    if len(parts) < len(modules):
        return None
    if len(parts) == 1 or not _can_fuse(parts):
        return tuple(_with_tensor_scaling(part) for part in parts)
    bases = [_base(m) for m in modules]
    weight, scale, bias = (_fuse(bases, name) for name in ("weight", "scale", "bias"))
    assert weight is not None
    first = parts[0]
    downs, ups = (tuple(t for part in parts for t in getattr(part, name)) for name in ("downs", "ups"))
    return (_with_tensor_scaling(Linears(weight, scale, bias, downs, ups, first.scaling, first.dropout)),)


def _with_tensor_scaling(part: Linears) -> Linears:
    if not part.downs:
        return part
    return part._replace(scaling=torch.as_tensor(part.scaling, dtype=torch.float32, device=part.downs[0].device))


def _can_fuse(parts: Sequence[Linears]) -> bool:
    """Whether all are int8 and of one shape, have a bias or none, and adapters of one rank and scaling or none.

    Dropout prevents it.
    """
    alike = {
        (p.weight.dtype, p.weight.shape, p.bias is None, p.scaling, tuple(d.shape for d in p.downs)) for p in parts
    }
    return len(alike) == 1 and not any(p.dropout for p in parts) and parts[0].scale is not None


def _linear(module: nn.Module, dropout: bool) -> Linears | None:
    """One linear with its adapter. None for a kind of adapter that this file does not know."""
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
    if _is_off(layer) or name not in layer.lora_A:
        return plain
    if layer.use_dora.get(name) or layer.lora_bias.get(name) or getattr(layer, "lora_variant", {}).get(name):
        return None
    rate = getattr(layer.lora_dropout[name], "p", 0.0) if dropout else 0.0
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return plain._replace(downs=(down,), ups=(up,), scaling=float(layer.scaling[name]), dropout=float(rate))


def _is_off(layer: BaseTunerLayer) -> bool:
    """Whether a layer's adapters are off for longer than a pass of ``without_adapter``."""
    return layer.disable_adapters and not is_without_adapter()


def _base(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, LoraLinear) else module


def _fuse(modules: Sequence[Any], name: str) -> Tensor | None:
    """The modules' tensors one below the other. Theirs become views of the result, so that nothing is stored twice."""
    tensors = [getattr(m, name).detach() for m in modules if getattr(m, name) is not None]
    if len(tensors) < len(modules):
        return None
    first = tensors[0]
    size = first.shape[0]
    bytes_each = first.numel() * first.element_size()
    if all(
        t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and t.data_ptr() == first.data_ptr() + i * bytes_each
        and t.is_contiguous()
        for i, t in enumerate(tensors)
    ):  # already fused
        return first.as_strided((size * len(tensors), *first.shape[1:]), first.stride(), first.storage_offset())
    fused = torch.cat(tensors)
    for i, module in enumerate(modules):
        part = fused[i * size : (i + 1) * size]
        if isinstance(getattr(module, name), nn.Parameter):
            getattr(module, name).data = part
        else:
            setattr(module, name, part)
    return fused
