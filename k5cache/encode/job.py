"""The encoders' passes: every new caption through CLIP and Qwen, every new image through the VAE, into shards.

One encoder is loaded at a time and freed before the next. Captions go in chunks, each committed when it is done, so
that neither memory nor what a kill costs grows with their number. Rows are written by a thread while the next are
computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache.encode import estimate
from k5cache.options import CacheConfig
from k5cache.shared.errors import ModelError
from k5cache.sources.items import Content

if TYPE_CHECKING:
    import torch


DTYPES = estimate.DTYPES


_ROWS_IN_FLIGHT = 32


@dataclass(frozen=True)
class Job:
    """What an encode needs to know all the way through."""

    read: Callable[[str], Content]
    """An image by its path in the source: a file, or its bytes."""
    root: Path
    folder: Path
    recipe: dict[str, Any]
    config: CacheConfig
    device: str
    bars: Progress
    vram: int | None = None
    """Bytes of VRAM to plan for; None takes what is free."""


def _numbers(append: Callable[[dict[str, Any]], None], config: CacheConfig) -> Callable[[dict[str, Any]], None]:
    """``append`` for rows of numbers; NaN or infinity is a ``ModelError``: float16 overflows in some models."""
    precisions = {
        "prompt_embeds": "text_encoder_1_precision",
        "pooled": "text_encoder_2_precision",
        "mean": "vae_precision",
        "std": "vae_precision",
    }

    def checked(row: dict[str, Any]) -> None:
        for name in precisions.keys() & row.keys():
            if not row[name].isfinite().all():
                option = precisions[name]
                what = repr(row["caption"][:60]) if "caption" in row else "an image"
                raise ModelError(
                    f"The encoder of {name} gives {what} numbers that are not finite, with cache.{option} = "
                    f'"{getattr(config, option)}"',
                    f'Set cache.{option} = "{"fp32" if name in ("mean", "std") else "bf16"}", '
                    "or download the model again",
                )
        append(row)

    return checked


@contextmanager
def _in_background(append: Callable[[dict[str, Any]], None]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield ``append`` as a thread does it, in order, a few rows behind; what it raises is raised here."""
    waiting: deque[Future[None]] = deque()
    is_broken = False

    def write(row: dict[str, Any]) -> None:
        nonlocal is_broken
        if not is_broken:
            is_broken = True  # until it has worked
            append(row)
            is_broken = False

    def put(row: dict[str, Any]) -> None:
        if len(waiting) >= _ROWS_IN_FLIGHT:
            waiting.popleft().result()
        waiting.append(pool.submit(write, row))

    with ThreadPoolExecutor(1, thread_name_prefix="k5-write") as pool:
        yield put
        while waiting:
            waiting.popleft().result()


@contextmanager
def _bar(bars: Progress, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    task = bars.add_task(description, total=total, unit=unit, note="")

    def advance(count: int, description: str | None = None) -> None:
        bars.update(task, advance=count, description=description)

    try:
        yield advance
    finally:
        bars.remove_task(task)


def _dtype(precision: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype
