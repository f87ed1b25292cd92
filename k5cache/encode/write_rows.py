"""How do rows get from an encoder to a sink? Checked for NaN, and written by a thread while the next are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from k5cache.buckets import Bucket
from k5cache.encode.sink import Append, RowSink
from k5cache.options import CacheConfig
from k5cache.shared.errors import ModelError
from k5cache.store.manifest import ShardKind
from k5cache.store.tensors import TensorSpec

_ROWS_IN_FLIGHT = 32
_PRECISION_OPTIONS = {
    "prompt_embeds": "text_encoder_1_precision",
    "pooled": "text_encoder_2_precision",
    "mean": "vae_precision",
    "std": "vae_precision",
}


@contextmanager
def row_writer(
    sink: RowSink, config: CacheConfig, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None
) -> Iterator[Append]:
    """Yield a function that takes rows and returns at once, up to 32 rows ahead of the disk.

    Raises:
        ModelError: a row has NaN or infinity; at the latest when the context ends.
    """
    with sink.shards(kind, specs, bucket) as append, _in_background(_finite_only(append, config)) as put:
        yield put


def _finite_only(append: Append, config: CacheConfig) -> Append:
    """``append`` for rows without NaN and infinity; others are a ``ModelError``: float16 overflows in some models."""

    def checked(row: dict[str, Any]) -> None:
        for name in _PRECISION_OPTIONS.keys() & row.keys():
            if not row[name].isfinite().all():
                option = _PRECISION_OPTIONS[name]
                subject = repr(row["caption"][:60]) if "caption" in row else "an image"
                raise ModelError(
                    f"The encoder of {name} gives {subject} numbers that are not finite, with cache.{option} = "
                    f'"{getattr(config, option)}"',
                    f'Set cache.{option} = "{"fp32" if name in ("mean", "std") else "bf16"}", '
                    "or download the model again",
                )
        append(row)

    return checked


@contextmanager
def _in_background(append: Append) -> Iterator[Append]:
    """Yield ``append`` as a thread runs it: in order, a few rows behind. What it raises is raised here."""
    pending: deque[Future[None]] = deque()
    is_broken = False

    def write(row: dict[str, Any]) -> None:
        nonlocal is_broken
        if not is_broken:
            is_broken = True  # until it has worked
            append(row)
            is_broken = False

    def put(row: dict[str, Any]) -> None:
        if len(pending) >= _ROWS_IN_FLIGHT:
            pending.popleft().result()
        pending.append(pool.submit(write, row))

    with ThreadPoolExecutor(1, thread_name_prefix="k5-write") as pool:
        try:
            yield put
        except KeyboardInterrupt:  # the rows that are encoded are still written, unless one cannot be
            while pending:
                pending.popleft().result()
            raise
        while pending:
            pending.popleft().result()
