"""CLIP: one pooled vector for each caption, as the pipeline computes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import ModelError
from k5cache.shared.handed_over import handed_over

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Clip:
    """``CLIPTextModel`` and its tokenizer, in evaluation mode, without gradients."""

    model: Any
    tokenizer: Any


def load_clip(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Clip:
    """Load ``folder/text_encoder_2`` and ``folder/tokenizer_2``.

    Raises:
        ModelError: the folder holds another model, or lacks a tensor or the tokenizer.
    """
    from transformers import CLIPTextModel

    where = folder / "text_encoder_2"
    if read_config(folder, where.name).get("model_type") not in ("clip_text_model", "clip"):
        raise ModelError(f"{where} is not a CLIP text encoder", "Download the model again")
    with handed_over(folder, where.name) as only, no_progress_bar():
        model, info = CLIPTextModel.from_pretrained(
            only, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    tokenizer = load_clip_tokenizer(folder)
    if info["missing_keys"]:
        raise ModelError(f"{where} lacks {', '.join(sorted(info['missing_keys'])[:3])}", "Download the model again")
    return Clip(model=model.to(device).eval().requires_grad_(False), tokenizer=tokenizer)


def load_clip_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder/tokenizer_2``.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    from transformers import CLIPTokenizer

    with handed_over(folder, "tokenizer_2") as only:
        return CLIPTokenizer.from_pretrained(only, local_files_only=True, trust_remote_code=False)


def encode_pooled(clip: Clip, captions: Sequence[str], *, exact: bool = True, batch_size: int = 64) -> torch.Tensor:
    """Compute the pooler output of each cleaned caption. Captions are cut at 77 tokens, as the pipeline cuts them.

    Args:
        exact: encode each caption alone, which gives the bits of ``Kandinsky5T2IPipeline.encode_prompt``. False
            encodes in batches and rounds differently: the matrix products have another size, and the library builds
            a mask that it does not build for one full caption.

    Returns:
        ``[B, 768]`` on the CPU, in the model's dtype.
    """
    import torch

    size = 1 if exact else batch_size
    pooled = []
    with torch.no_grad():
        for start in range(0, len(captions), size):
            # The arguments of Kandinsky5T2IPipeline._encode_prompt_clip; a test compares the outcome.
            inputs = clip.tokenizer(
                list(captions[start : start + size]),
                max_length=77,
                truncation=True,
                add_special_tokens=True,
                padding="max_length",
                return_tensors="pt",
            ).to(clip.model.device)
            pooled.append(clip.model(**inputs)["pooler_output"].cpu())
    return torch.cat(pooled) if pooled else torch.empty(0, clip.model.config.hidden_size, dtype=clip.model.dtype)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide the library's own progress bar: the command has one."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
