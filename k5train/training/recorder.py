"""How is work recorded once and repeated without launching its kernels one by one? As a CUDA graph."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, Protocol

import torch

from k5train.forward.stream import Streamer

Work = Callable[[], object]
"""Reads and writes only tensors that stay where they are."""


class Recorder(Protocol):
    """Records work and repeats it."""

    def record(self, work: Work) -> Work:
        """What does ``work`` again, on the same tensors. Recording does not do it."""

    def release(self) -> None:
        """Give back the memory of all that was recorded. Nothing of it may be repeated afterwards."""


class CudaGraphs:
    """Records CUDA graphs, which share one pool of memory.

    Args:
        streamer: copies weights while the work is done. Each graph begins and ends with the first blocks in place.
    """

    def __init__(self, device: torch.device, streamer: Streamer | None = None) -> None:
        self.device, self.streamer = device, streamer
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: list[Any] = []
        self._pool: Any = None

    def record(self, work: Work) -> Work:
        """Capture ``work``. It must have been done before, so that nothing is compiled or loaded meanwhile.

        Raises:
            RuntimeError: it cannot be captured; torch.OutOfMemoryError, if there is not enough memory.
        """
        graph: Any = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self.streamer:
            self.streamer.start_over()
        current = torch.cuda.current_stream(self.device)
        try:
            # thread_local: the loader's thread page-locks memory meanwhile, which is of no concern to the graph.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with warnings.catch_warnings():
                # Of a capture that breaks off torch also says that it is empty; why it broke off is what counts.
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                with capture, self.streamer.joined() if self.streamer else nullcontext():
                    work()
        except BaseException:
            # Of a capture that cannot even be ended torch leaves the stream the current one, the allocator in the
            # graph's pool, and the pool in use for good. Where it was ended, the first of the two calls raises.
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)
                torch._C._cuda_releasePool(self.device.index or 0, self._pool)
            with suppress(RuntimeError):
                graph.reset()
            _clear_workspaces()
            raise
        finally:
            if self.streamer:
                self.streamer.reset()
        self._graphs.append(graph)
        replay: Work = graph.replay
        return replay

    def release(self) -> None:
        """Free the graphs and their pool."""
        if self._pool is None:
            return
        torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs, self._pool = [], None
        _clear_workspaces()
        gc.collect()
        torch.cuda.empty_cache()


def _clear_workspaces() -> None:
    """Free cuBLAS's workspaces. torch keeps one a thread and stream for good, and those of a capture are in its pool,
    which would stay with them: 0.1 GiB of every session in a process. The next matmul makes its own anew."""
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


class Again:
    """Stands for a recorder where there are no graphs: repeats work by doing it again."""

    def record(self, work: Work) -> Work:
        """``work`` itself."""
        return work

    def release(self) -> None:
        """Nothing is held."""


def make_recorder(device: torch.device, streamer: Streamer | None) -> Recorder:
    """The recorder of a device."""
    return CudaGraphs(device, streamer) if device.type == "cuda" else Again()
