"""A small cache to try the store on: four items of 64x64 pixels, three captions, the empty prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, lock, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec

LATENTS = {name: TensorSpec("float16", (8, 8, 16)) for name in ("mean", "std")}
TEXT = {"prompt_embeds": TensorSpec("bfloat16", (None, 12)), "pooled": TensorSpec("bfloat16", (5,))}
CAPTIONS = {"t-cat": ("a cat", 3), "t-dog": ("a dög\nruns", 7), "t-empty": ("", 1)}


def latents_row(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    mean, std = torch.randn(2, 8, 8, 16, generator=generator).half()
    return {"key": f"l-{number}", "mean": mean, "std": std.abs()}


def text_row(key: str) -> dict[str, Any]:
    caption, n_tokens = CAPTIONS[key]
    generator = torch.Generator().manual_seed(n_tokens)
    return {
        "key": key,
        "prompt_embeds": torch.randn(n_tokens, 12, generator=generator).bfloat16(),
        "pooled": torch.randn(5, generator=generator).bfloat16(),
        "n_tokens": n_tokens,
        "caption": caption,
    }


def index_row(number: int, caption_keys: tuple[str, ...] = ("t-cat",)) -> IndexRow:
    return IndexRow(
        path=f"sub/é {number}.png",
        content_hash="0" * 32,
        num_bytes=123,
        mtime_ns=1_700_000_000_000_000_001,
        inode=2**63 + number,
        width=100,
        height=80,
        bucket_width=64,
        bucket_height=64,
        resized_width=80,
        resized_height=64,
        left=8,
        top=0,
        flipped=number % 2 == 1,
        latent_key=f"l-{number}",
        caption_keys=caption_keys,
    )


def make_cache(root: Path) -> Manifest:
    """Two latents shards of two rows, one text shard; item 3 has two captions."""
    with lock(root):
        shards = []
        for numbers in ((2, 0), (3, 1)):
            with ShardWriter(root, "latents", LATENTS, (64, 64)) as writer:
                for number in numbers:
                    writer.append(latents_row(number))
                shards.append(writer.finish())
        with ShardWriter(root, "text", TEXT) as writer:
            for key in CAPTIONS:
                writer.append(text_row(key))
            shards.append(writer.finish())
        manifest = Manifest(recipe={"text": {"template": "é"}}, shards=tuple(shards), created_by={"k5cache": "0.1.0"})
        rows = [index_row(0), index_row(1), index_row(2), index_row(3, ("t-dog", "t-cat"))]
        manifest = replace(with_index(root, manifest, rows), prompts={"": "t-empty", " A  cat": "t-cat"})
        write_manifest(root, manifest)
    return manifest


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))
