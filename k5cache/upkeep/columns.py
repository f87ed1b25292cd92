"""Does a shard have the columns that a trainer needs, in the shapes that its bucket and its captions say? Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from k5cache.buckets import Bucket
from k5cache.store.manifest import ShardInfo

if TYPE_CHECKING:
    import torch

FLOATS = ("bfloat16", "float16", "float32")


Column = tuple[tuple[int | None, ...], tuple[str, ...]]
"""The shape of a tensor, with None for a width that all rows of a cache share, and the allowed data types."""


def needed_columns(shard: ShardInfo, n_tokens: int, has_std: bool) -> dict[str, Column]:
    """The tensors of a row.

    Args:
        has_std: whether the recipe's posterior is "sample", so that latents are drawn anew in each step.
    """
    if shard.bucket is None:
        return {"prompt_embeds": ((n_tokens, None), FLOATS), "pooled": ((None,), FLOATS)}
    height, width = Bucket(*shard.bucket).latent_shape
    if shard.kind == "masks":
        return {"mask": ((height, width), ("uint8",))}
    return dict.fromkeys(("mean", "std") if has_std else ("mean",), ((height, width, None), ("float16",)))


def column_problems(
    shard: ShardInfo, tensors: Mapping[str, torch.Tensor], n_tokens: int, has_std: bool, widths: dict[str, int]
) -> Iterator[str]:
    """What is wrong with the columns of one row.

    Args:
        widths: column -> the last size of its shape in the rows before. It is added to.
    """
    needed = needed_columns(shard, n_tokens, has_std)
    for name in tensors.keys() - needed.keys() - {"std"}:
        yield f"has a column {name!r}, which no trainer reads"
    if shard.kind == "text" and n_tokens < 1:
        yield "has a caption of 0 tokens"
    for name, (shape, dtypes) in needed.items():
        if name not in tensors:
            yield f"has no column {name}, which a trainer needs"
            continue
        actual, dtype = tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")
        expected = tuple(widths.get(name) if size is None else size for size in shape)
        is_right = len(actual) == len(expected) and all(e in (None, a) for a, e in zip(actual, expected, strict=True))
        if not is_right or dtype not in dtypes:
            sizes = ", ".join("any" if size is None else str(size) for size in expected)
            yield f"has {name} as {dtype} {list(actual)}, and it must be {' or '.join(dtypes)} [{sizes}]"
        elif shape[-1] is None:
            widths.setdefault(name, actual[-1])
