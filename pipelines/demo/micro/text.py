"""What do captions become in training? The tensors of ``Kandinsky5T2IPipeline.encode_prompt``, with gradients.

Nothing is padded, because the transformer has no text mask. Captions are grouped by length, and a batch comes from one
group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Captions:
    """Captions of one length, as tokens for Qwen and for CLIP."""

    rows: Tensor
    """``[N]`` int64: which rows they belong to."""
    ids: Tensor
    """``[N, 40 + L]``: Qwen's, in the pipeline's template."""
    ids_2: Tensor
    """``[N, T]``: CLIP's, cut after the longest caption. Tokens after a caption's end do not change its pooled state,
    because attention looks only back."""

    def pick(self, at: Tensor) -> Captions:
        return Captions(self.rows[at], self.ids[at], self.ids_2[at])


def tokenize(pipeline: Any, captions: list[str], device: torch.device, at_least: int = 1) -> list[Captions]:
    """Group captions by their number of tokens, shortest first.

    Args:
        at_least: a length with fewer captions is left out.
    """
    texts = list(dict.fromkeys(captions))
    templated = [pipeline.prompt_template.format(text) for text in texts]
    ids = dict(zip(texts, pipeline.tokenizer(templated)["input_ids"], strict=True))
    ids_2 = dict(zip(texts, pipeline.tokenizer_2(texts)["input_ids"], strict=True))
    longest, end = max(map(len, ids_2.values())), pipeline.tokenizer_2.eos_token_id
    assert longest <= 77
    by_length: dict[int, list[int]] = {}
    for row, text in enumerate(captions):
        by_length.setdefault(len(ids[text]), []).append(row)
    groups = []
    for _, rows in sorted(by_length.items()):
        if len(rows) >= at_least:
            padded = [ids_2[captions[row]] + [end] * (longest - len(ids_2[captions[row]])) for row in rows]
            tensors = (rows, [ids[captions[row]] for row in rows], padded)
            groups.append(Captions(*(torch.tensor(values, device=device) for values in tensors)))
    return groups


def embed(pipeline: Any, captions: Captions) -> tuple[Tensor, Tensor]:
    """``prompt_embeds`` [B, L, 128], after the final norm and the crop, and ``pooled_projections`` [B, 64]."""
    hidden = pipeline.text_encoder.model(input_ids=captions.ids, use_cache=False).last_hidden_state
    pooled = pipeline.text_encoder_2(input_ids=captions.ids_2).pooler_output
    return hidden[:, pipeline.prompt_template_encode_start_idx :], pooled


@torch.no_grad()
def largest_difference(pipeline: Any, captions: list[str], device: torch.device) -> float:
    """The largest difference between ``embed`` and ``encode_prompt`` of each caption alone."""
    largest = 0.0
    for group in tokenize(pipeline, captions, device):
        ours, ours_2 = embed(pipeline, group)
        for i, row in enumerate(group.rows.tolist()):
            theirs, theirs_2, _ = pipeline.encode_prompt(captions[row], device=device)
            assert theirs[0].shape == ours[i].shape, (captions[row], theirs.shape, ours.shape)
            for a, b in ((ours[i], theirs[0]), (ours_2[i], theirs_2[0])):
                largest = max(largest, (a.float() - b.float()).abs().max().item())
    return largest
