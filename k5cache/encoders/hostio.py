"""How do tensors get to the device and back without making it wait?

A few threads read layers from their files into pinned memory, and from there to the device while it computes. Nothing
is mapped, so only 64 MiB of a model are in host memory at a time. Results are copied to pinned memory while the next
ones are computed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from k5cache.shared import system
from k5cache.shared.errors import ModelError
from k5cache.shared.part_files import StoredTensor
from k5cache.store.tensors import torch_dtype

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 16 * 2**20
NUM_THREADS = 4  # one core copies 4 to 6 GB/s out of the page cache; a fast disk gives 7
_ALIGN = 256  # bytes, for tensors within a buffer: at least what cuBLAS needs
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_Tag = TypeVar("_Tag")


def read_ahead(
    groups: Sequence[Sequence[StoredTensor]], device: torch.device, *, reuse: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each group (a layer) on ``device``, in the file's dtype, while the next group is read.

    Args:
        groups: where the tensors are in the files. Each has a dtype of ``DTYPES`` and is read once.
        reuse: use two buffers for all groups. A group is then valid until the next one is asked for; the device may
            still be computing with it at that time. False gives each group its own memory.

    Raises:
        ModelError: a file became shorter while it was read.
    """
    import torch

    offsets = [_layout(group) for group in groups]
    largest = max(total for _, total in offsets)
    buffers = [
        torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(groups)) if reuse else 0)
    ]
    with ExitStack() as stack:
        reader = stack.enter_context(_Reader(device))

        def start(i: int) -> tuple[torch.Tensor, list[Future[None]]]:
            buffer = buffers[i % 2] if reuse else torch.empty(offsets[i][1], dtype=torch.uint8, device=device)
            return buffer, reader.read(groups[i], offsets[i][0], buffer)

        following = start(0)
        for i, group in enumerate(groups):
            buffer, pending = following
            if i + 1 < len(groups):
                following = start(i + 1)
            for future in pending:
                future.result()
            yield {t.name: _view(buffer, at, t) for t, at in zip(group, offsets[i][0], strict=True)}


def fetched(results: Iterable[tuple[_Tag, torch.Tensor]]) -> Iterator[tuple[_Tag, torch.Tensor]]:
    """Yield each result with its tensor on the CPU. One is copied while the next is computed."""
    import torch

    waiting: deque[tuple[_Tag, torch.Tensor, Any]] = deque()
    for tag, tensor in results:
        if tensor.device.type != "cuda":
            yield tag, tensor.cpu()
            continue
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        waiting.append((tag, host, record_event(tensor.device)))
        del tensor
        if len(waiting) > 1:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(tag: _Tag, host: torch.Tensor, copied: Any) -> tuple[_Tag, torch.Tensor]:
    copied.synchronize()
    return tag, host


def record_event(device: torch.device) -> Any:
    """Record a ``torch.cuda.Event`` on a GPU's current stream. Waiting for it sleeps instead of spinning."""
    import torch

    cuda: Any = torch.cuda
    event = cuda.Event(blocking=True)
    event.record(cuda.current_stream(device))
    return event


def new_stream(device: torch.device) -> Any:
    """A ``torch.cuda.Stream``."""
    import torch

    cuda: Any = torch.cuda
    return cuda.Stream(device)


class _Reader:
    """Threads that read pieces of files into one buffer on the device, in the order of the requests."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._files: dict[Path, int] = {}
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="k5-read")
        self._stream = new_stream(device) if device.type == "cuda" else None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, group: Sequence[StoredTensor], starts: Sequence[int], buffer: torch.Tensor) -> list[Future[None]]:
        """Start to read a group. The buffer is written once the device has finished what was queued before."""
        import torch

        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in group:
            if tensor.path not in self._files:
                self._files[tensor.path] = system.open_bytes(tensor.path)
        return [
            self._pool.submit(self._piece, tensor, at, buffer[start + at :][: min(PIECE_BYTES, tensor.num_bytes - at)])
            for tensor, start in zip(group, starts, strict=True)
            for at in range(0, tensor.num_bytes, PIECE_BYTES)
        ]

    def _piece(self, tensor: StoredTensor, at: int, target: torch.Tensor) -> None:
        import torch

        if self._stream is None:
            self._fill(tensor, at, target)
            return
        if not hasattr(self._local, "staging"):
            self._local.staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        staging: torch.Tensor = self._local.staging[: len(target)]
        self._fill(tensor, at, staging)
        with torch.cuda.stream(self._stream):
            target.copy_(staging, non_blocking=True)
            copied = record_event(self._device)
        copied.synchronize()

    def _fill(self, tensor: StoredTensor, at: int, memory: torch.Tensor) -> None:
        rest = memoryview(cast(Any, memory.numpy()))
        offset = tensor.start + at
        while rest:
            count = system.read_into(self._files[tensor.path], [rest], offset)
            if not count:
                raise ModelError(f"{tensor.path} was cut short while it was read", "Download the model again")
            rest, offset = rest[count:], offset + count


def _layout(group: Sequence[StoredTensor]) -> tuple[list[int], int]:
    """Where each tensor begins in a buffer, and the buffer's bytes."""
    starts, end = [], 0
    for tensor in group:
        starts.append(end)
        end += -(-tensor.num_bytes // _ALIGN) * _ALIGN
    return starts, end


def _view(buffer: torch.Tensor, start: int, tensor: StoredTensor) -> torch.Tensor:
    flat = buffer[start : start + tensor.num_bytes].view(torch_dtype(DTYPES[tensor.dtype]))
    return flat.view(tensor.shape)
