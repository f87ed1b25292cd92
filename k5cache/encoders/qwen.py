"""Qwen2.5-VL as a text encoder: only the layers a caption passes through, and the hidden states the pipeline keeps.

The lm_head and the vision tower (2.5 of 16.6 GB) are never read. Weights come tensor by tensor out of mapped
safetensors files, so a host copy of the model never exists.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from k5cache.encoders.pipeline import pipeline_facts, pipeline_token_ids
from k5cache.errors import ModelError
from k5cache.hub import read_config, weight_files

if TYPE_CHECKING:
    import torch

# Where the text layers live in a file: published Qwen2.5-VL, saved by newer versions, bare base or text models.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


@dataclass(frozen=True)
class Tokens:
    """One cleaned caption in its template, as the pipeline tokenises it alone."""

    ids: list[int]
    """Template included, no padding."""
    n_tokens: int
    """Rows of ``prompt_embeds``: ids after the pipeline's crop."""
    truncated: str
    """The end of the caption that no id stands for; "" when all of it is encoded."""


@dataclass(frozen=True)
class Qwen:
    """The text layers on a device, ready for ``encode_prompt_embeds``."""

    model: Any
    """``Qwen2_5_VLTextModel`` in evaluation mode, gradients off."""
    encode_start_idx: int
    """Hidden states cropped off the front: the template's."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder/tokenizer``, without the processor around it, which needs torchvision.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"The tokenizer in {folder / 'tokenizer'} cannot be loaded: {str(error).splitlines()[0]}",
            "Download the model again",
        ) from error
    # The pipeline passes no attention mask and crops from the left: left padding would move the crop.
    tokenizer.padding_side = "right"
    return tokenizer


def tokenize(tokenizer: Any, caption: str, max_sequence_length: int) -> Tokens:
    """Token ids of one cleaned caption, cut where the pipeline cuts.

    Args:
        caption: after ``clean``.
        max_sequence_length: tokens kept after the crop, the template's closing tag among them.
    """
    facts = pipeline_facts()
    ids = pipeline_token_ids(tokenizer, caption, max_sequence_length)
    whole = tokenizer(text=facts.prompt_template.format(caption))["input_ids"]
    truncated = ""
    if ids != whole:
        # The tokenizer composes characters (NFC); a character cut in half decodes to another, so it counts as lost.
        caption = unicodedata.normalize("NFC", caption)
        kept = tokenizer.decode(ids).removeprefix(facts.prompt_template.partition("{}")[0])
        truncated = caption[_agreement(kept, caption) :]
    return Tokens(ids=ids, n_tokens=len(ids) - facts.encode_start_idx, truncated=truncated)


def load_qwen(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Qwen:
    """Load the text layers of ``folder/text_encoder``.

    On the CPU in the file's own dtype the weights stay mapped; elsewhere each tensor is read, cast, moved and let go.

    Args:
        dtype: of weights and arithmetic. Rotary frequencies stay float32, as ``from_pretrained`` keeps them.

    Raises:
        ModelError: a tensor is missing, has another shape, or the folder holds another model.
    """
    model = empty_text_model(folder, dtype)
    weights = TextWeights(folder)
    weights.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    state = {name: weights.tensor(name).to(device=device, dtype=dtype) for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    model.rotary_emb = type(model.rotary_emb)(model.config).to(device)  # made on the CPU, then moved: the same bits
    model.eval().requires_grad_(False)
    return Qwen(model=model, encode_start_idx=pipeline_facts().encode_start_idx)


def encode_prompt_embeds(
    qwen: Qwen, tokens: Sequence[Tokens], *, exact: bool = True, batch_tokens: int = 8192
) -> list[torch.Tensor]:
    """Last hidden states after the final norm, the template cropped off: what the transformer is conditioned on.

    Args:
        exact: one caption a forward, so that every bit is what ``Kandinsky5T2IPipeline.encode_prompt`` gives for that
            caption alone. False puts captions of equal length in one forward (never padded); a matrix product of
            another size may round differently.
        batch_tokens: most tokens, template included, in one forward of ``exact=False``.

    Returns:
        ``[n_tokens, 3584]`` a caption, in the order given, on the CPU, in the model's dtype.
    """
    import torch

    embeds: dict[int, torch.Tensor] = {}
    device = qwen.model.norm.weight.device
    with torch.no_grad():
        for batch in _batches(tokens, 1 if exact else batch_tokens):
            input_ids = torch.tensor([tokens[i].ids for i in batch], device=device)
            # No mask and no positions, like the pipeline: plain causal attention over 0..L-1 on all three axes.
            hidden = qwen.model(input_ids=input_ids, use_cache=False).last_hidden_state
            hidden = hidden[:, qwen.encode_start_idx :].cpu()
            embeds.update({i: hidden[row].clone() for row, i in enumerate(batch)})
    return [embeds[i] for i in range(len(tokens))]


def empty_text_model(folder: Path, dtype: torch.dtype) -> Any:
    """``Qwen2_5_VLTextModel`` of the folder's config on the meta device: shapes, no memory."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    config = read_config(folder, "text_encoder")
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelError(
            f"{folder / 'text_encoder'} is a {config.get('model_type', 'model without a type')}, not Qwen2.5-VL",
            "Give a Kandinsky 5 Image repository in the diffusers layout with --model DIR",
        )
    text_config = Qwen2_5_VLConfig.from_dict(config).text_config
    text_config.dtype = dtype
    with torch.device("meta"):
        return Qwen2_5_VLTextModel(text_config).to(dtype)


class TextWeights:
    """The text layers in ``folder/text_encoder``: mapped, addressed by ``Qwen2_5_VLTextModel``'s own names.

    Raises:
        ModelError: the files hold no text layers.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        self._where = folder / "text_encoder"
        for path in weight_files(folder, "text_encoder"):
            try:
                opened: Any = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ModelError(f"{path} is damaged: {error}", "Download the model again") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))
        prefixes = [p for p in _PREFIXES if f"{p}embed_tokens.weight" in self._files]
        if not prefixes:
            raise ModelError(
                f"{self._where} lacks embed_tokens.weight: no text layers", "Give a whole Qwen2.5-VL text encoder"
            )
        self._prefix = prefixes[0]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Every name is there in that shape, before anything is read.

        Raises:
            ModelError: names the first tensors that are missing or have another shape.
        """
        absent = [self._prefix + name for name in shapes if self._prefix + name not in self._files]
        if absent:
            raise ModelError(f"{self._where} lacks {_listed(absent)}", "Download the model again")
        found = {name: tuple(self._slice(name).get_shape()) for name in shapes}
        wrong = [f"{self._prefix + n} {found[n]} instead of {shapes[n]}" for n in shapes if found[n] != shapes[n]]
        if wrong:
            raise ModelError(
                f"{self._where} does not match its config.json: {_listed(wrong)}", "Download the model again"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped: bytes are read when they are used."""
        return cast("torch.Tensor", self._files[self._prefix + name].get_tensor(self._prefix + name))

    def _slice(self, name: str) -> Any:
        return self._files[self._prefix + name].get_slice(self._prefix + name)


def _batches(tokens: Sequence[Tokens], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of captions of one length, longest first so that a card too small says so at once."""
    by_length: dict[int, list[int]] = {}
    for i, caption in enumerate(tokens):
        by_length.setdefault(len(caption.ids), []).append(i)
    for length in sorted(by_length, reverse=True):
        size = max(1, batch_tokens // length)
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]


def _agreement(a: str, b: str) -> int:
    """Characters from the start on which two texts agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
