"""Random inputs in the form that a run reads: a cache of rows, and a checkpoint in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5train.base.quantize import empty_transformer

NUM_ROWS = 48
CAPTION_LENGTHS = tuple(range(200, 328, 16))  # in tokens, in turn; 256 on average, as in `k5train bench`
SHARD_BYTES = 4 * 2**30

VAE = {
    "_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
}  # Flux's  # fmt: skip
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}


def write_cache(root: Path, model: Mapping[str, Any], side: int, num_rows: int = NUM_ROWS) -> None:
    """Write a cache of random rows as ``k5cache encode`` does: mean and std in float16, captions in bfloat16."""
    size = side // 8
    latents = {name: TensorSpec("float16", (size, size, model["in_visual_dim"])) for name in ("mean", "std")}
    text = {"prompt_embeds": TensorSpec("bfloat16", (None, model["in_text_dim"])),
            "pooled": TensorSpec("bfloat16", (model["in_text_dim2"],))}  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def pictures() -> Iterator[dict[str, Any]]:
        for i in range(num_rows):
            mean, std = torch.randn(2, size, size, model["in_visual_dim"], generator=generator)
            yield {"key": _key(i), "mean": mean.half(), "std": (std - 5).exp().half()}

    def captions() -> Iterator[dict[str, Any]]:
        for i in range(num_rows + 1):  # the last is the empty prompt
            n_tokens = CAPTION_LENGTHS[i % len(CAPTION_LENGTHS)] if i < num_rows else 8
            embeds = torch.randn(n_tokens, model["in_text_dim"], generator=generator).bfloat16()
            pooled = torch.randn(model["in_text_dim2"], generator=generator).bfloat16()
            caption = f"caption {i}" if i < num_rows else ""
            yield {"key": _key(i), "prompt_embeds": embeds, "pooled": pooled, "n_tokens": n_tokens, "caption": caption}

    with lock(root):
        shards = (_shard(root, "latents", latents, pictures(), (side, side)), _shard(root, "text", text, captions()))
        recipe = {"model": {"source": "random weights"}, "selection": {"resolution": side}}
        manifest = Manifest(recipe=recipe, shards=shards, prompts={"": _key(num_rows)})
        write_manifest(root, with_index(root, manifest, [_row(i, side) for i in range(num_rows)]))


def _shard(
    root: Path, kind: ShardKind, specs: dict[str, TensorSpec], rows: Iterator[dict[str, Any]],
    bucket: tuple[int, int] | None = None,
) -> ShardInfo:  # fmt: skip
    with ShardWriter(root, kind, specs, bucket) as writer:
        for row in rows:
            writer.append(row)
        return writer.finish()


def _key(number: int) -> str:
    return f"{number:032}"


def _row(i: int, side: int) -> IndexRow:
    return IndexRow(
        path=f"{i}.png", content_hash="0" * 32, num_bytes=1, mtime_ns=1, inode=i, width=side, height=side,
        bucket_width=side, bucket_height=side, resized_width=side, resized_height=side, left=0, top=0, flipped=False,
        latent_key=_key(i), caption_keys=(_key(i),),
    )  # fmt: skip


def model_folder(folder: Path, model: Mapping[str, Any]) -> Path:
    """Write what a run reads of a checkpoint besides its weights: three configs, and tensors to identify it by."""
    for part, document in (("transformer", dict(model)), ("vae", VAE)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")
    for part in ("transformer", "vae"):
        save_file({"none": torch.zeros(1)}, folder / part / "diffusion_pytorch_model.safetensors")
    return folder


def write_checkpoint(folder: Path) -> None:
    """Write random bf16 weights as shards in the hub's layout, in place of the folder's single tensor."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    num_bytes = 0
    transformer = empty_transformer(folder)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for name, meta in transformer.state_dict().items():
        tensor = torch.randn(meta.shape, generator=generator, device=generator.device) * 0.02
        if num_bytes + 2 * tensor.numel() > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor.bfloat16().cpu()
        num_bytes += 2 * tensor.numel()
    target = folder / "transformer"
    (target / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, target / file)
        weight_map |= dict.fromkeys(tensors, file)
        tensors.clear()
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
