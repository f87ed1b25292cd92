"""What is k5-micro-edit asked to do? Instructions, and for them the tensors that ``encode_prompt`` gives.

An instruction names a style and sometimes a background, never the thing that is drawn: that has to come from the
source. The pipeline cuts the first four tokens, so the words before the style are no more than polite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.demo.micro.data import BACKGROUNDS
from pipelines.demo.micro_edit.drawings import STYLES

TEMPLATE = (
    "<|im_start|>system\nYou are a prompt engineer. Based on the provided source image (first image) and target image "
    "(second image), create an interesting text prompt that can be used together with the source image to create the "
    "target image:<|im_end|><|im_start|>user{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
)  # Kandinsky5I2IPipeline; a test compares
CROP = 54  # prompt_template_encode_start_idx
GRID = 2  # tokens of a picture on a side: 128 pixels, halved, then rounded to 56, of 28 a token
PHRASES = ("draw this picture in {} style", "make this picture again in {} style", "show the same in {} style")
P_PHRASES = (0.6, 0.2, 0.2)
P_BACKGROUND = 0.3  # how often an instruction names one; otherwise the source's stays


def instruction(style: str, background: str = "", phrase: str = PHRASES[0]) -> str:
    """``draw this picture in flat emoji style, mint background``."""
    return phrase.format(style) + (f", {background} background" if background else "")


@dataclass(frozen=True)
class Instructions:
    """Instructions of one number of tokens, the empty one or some of those that name a style."""

    texts: list[str]
    style: Tensor
    """``[N]``: a place in ``STYLES``; -1: any."""
    background: Tensor
    """``[N]``: a place in ``BACKGROUNDS``; -1: the source's."""
    weight: Tensor
    """``[N]`` float32: how often each occurs."""
    ids: Tensor
    """``[N, T]``: Qwen's tokens, the picture's among them."""
    ids_2: Tensor
    """``[N, T]``: CLIP's, with its end token to the end, which do not change the pooled state."""
    positions: Tensor
    """``[3, 1, T]``: frame, row and column, as Qwen counts them."""


def all_instructions(pipeline: Any, device: torch.device) -> list[Instructions]:
    """The empty instruction, then all others in groups of one length."""
    rows: list[tuple[str, int, int, float]] = []
    names = list(BACKGROUNDS)
    for s, style in enumerate(STYLES):
        for phrase, probability in zip(PHRASES, P_PHRASES, strict=True):
            rows.append((instruction(style, "", phrase), s, -1, probability * (1 - P_BACKGROUND)))
            for b, name in enumerate(names):
                rows.append((instruction(style, name, phrase), s, b, probability * P_BACKGROUND / len(names)))
    groups: dict[int, list[tuple[str, int, int, float]]] = {}
    for row in rows:
        groups.setdefault(len(tokens(pipeline.tokenizer, row[0])), []).append(row)
    return [group(pipeline, rows, device) for rows in ([("", -1, -1, 1.0)], *(groups[n] for n in sorted(groups)))]


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The ids of an instruction in the template, with as many tokens as a picture has."""
    pad = "<|image_pad|>"
    ids: list[int] = tokenizer(TEMPLATE.format(text).replace(pad, pad * GRID**2))["input_ids"]
    return ids


def group(pipeline: Any, rows: list[tuple[str, int, int, float]], device: torch.device) -> Instructions:
    """Rows of one length as tensors."""
    texts, styles, backgrounds, weights = (list(column) for column in zip(*rows, strict=True))
    ids = [tokens(pipeline.tokenizer, text) for text in texts]
    ids_2 = pipeline.tokenizer_2(texts, padding="max_length", max_length=77)["input_ids"]
    longest = max(row.index(pipeline.tokenizer_2.eos_token_id) for row in ids_2) + 1
    first = ids[0].index(pipeline.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    return Instructions(
        texts=texts,
        style=torch.tensor(styles, device=device),
        background=torch.tensor(backgrounds, device=device),
        weight=torch.tensor(weights, device=device),
        ids=torch.tensor(ids, device=device),
        ids_2=torch.tensor(ids_2, device=device)[:, :longest],
        positions=positions(len(ids[0]), first).to(device),
    )


def positions(length: int, first: int) -> Tensor:
    """``[3, 1, length]``: a picture's tokens from ``first`` count rows and columns; text goes on after the largest."""
    before = torch.arange(first).expand(3, -1)
    at = torch.arange(GRID)
    picture = first + torch.stack([torch.zeros(GRID**2), at.repeat_interleave(GRID), at.repeat(GRID)]).long()
    after = first + GRID + torch.arange(length - first - GRID**2).expand(3, -1)
    return torch.cat([before, picture, after], dim=1)[:, None]


def embed(pipeline: Any, group: Instructions, chosen: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """``prompt_embeds`` [B, L, 128] and ``pooled_projections`` [B, 64], as the pipeline's ``encode_prompt`` gives them.

    Args:
        chosen: ``[B]``, places in the group.
        features: ``[B, 4, 64]``, what ``look`` gave for the sources.
    """
    qwen = pipeline.text_encoder.model
    merger, ids = qwen.visual.merger, group.ids[chosen]
    at = ids == pipeline.text_encoder.config.image_token_id
    pictures = merger.mlp(features).to(torch.float32)
    inputs = qwen.language_model.embed_tokens(ids).to(torch.float32)
    inputs = inputs.masked_scatter(at[..., None], pictures)
    hidden = qwen.language_model(
        inputs_embeds=inputs, position_ids=group.positions.expand(-1, len(ids), -1), use_cache=False
    ).last_hidden_state
    with torch.no_grad():  # CLIP stays k5-micro's
        pooled = pipeline.text_encoder_2(input_ids=group.ids_2[chosen]).pooler_output
    return hidden[:, CROP:], pooled


@torch.no_grad()
def look(pipeline: Any, pixels: Tensor, batch: int = 512) -> Tensor:
    """What the vision tower's layers, which stay as they are, say of pictures, normed; the merger behind them learns.

    Args:
        pixels: ``[N, 3, 128, 128]`` in [-1, 1].

    Returns:
        ``[N, 4, 64]``: four patches of 16 channels for each token.
    """
    seen: list[Tensor] = []
    visual = pipeline.text_encoder.model.visual
    hook = visual.merger.ln_q.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for part in torch.split(pixels, batch):
        patches = to_patches(part)
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]], device=pixels.device).expand(len(part), -1)
        visual(patches.flatten(0, 1), grid_thw=grid)
    hook.remove()
    return torch.cat(seen).view(len(pixels), GRID**2, -1).float()


def to_patches(pixels: Tensor) -> Tensor:
    """``[N, 16, 1176]``: halved, resized and normed as Pillow and Qwen's image processor do it, to a rounding."""
    from pipelines.demo.make_checkpoint import IMAGE_PROCESSOR

    values = (pixels.float() + 1) * 127.5
    for side in (64, 28 * GRID):
        values = F.interpolate(values, (side, side), mode="bicubic", antialias=True).clamp(0, 255).round()
    mean, std = (
        torch.tensor(IMAGE_PROCESSOR[key], device=pixels.device).view(3, 1, 1) for key in ("image_mean", "image_std")
    )
    normed = (values / 255 - mean) / std
    cut = normed.view(-1, 3, GRID, 2, 14, GRID, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)  # token, patch, colour, pixel
    return cut[:, :, :, :, :, :, None].expand(*cut.shape[:6], 2, 14, 14).reshape(len(pixels), 4 * GRID**2, -1)
