"""How are weights streamed? They live in page-locked host memory and are copied to the GPU ahead of each block."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k5cache.shared.console import human_bytes
from k5cache.shared.errors import DoesNotFit, RunError
from k5cache.shared.host_memory import free_ram
from k5train.base.linear import Int8Linear

if TYPE_CHECKING:
    from k5train.forward.predict_velocity import BlockPolicy
    from k5train.planning.memory import Streaming


_ALIGNMENT = 256  # bytes: what cuBLAS and vectorised loads like
_HOST_RESERVE = 2 * 2**30  # host memory that is left for everything else


def spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``range(count)``, evenly spread: resident blocks between streamed ones give the copies time."""
    return [i for i in range(count) if (i + 1) * chosen // count > i * chosen // count]


class Streamer:
    """Keeps the int8 weights of ``blocks`` in host memory, with room on the GPU for a few blocks at a time.

    A block always uses the same slot on the GPU. So its modules' tensors, and what autograd saved of them, stay views
    of that slot, whose contents change. A wait before each use, forward and backward, makes sure they are right.

    Args:
        blocks: in the order of the forward pass. Their int8 weights move to the host.

    Raises:
        DoesNotFit: there is not enough host memory.
        RunError: the host memory cannot be page-locked, or a block has nothing to stream.
    """

    def __init__(self, blocks: Sequence[nn.Module], streaming: Streaming, device: torch.device) -> None:
        self.device = device
        self.num_slots = min(streaming.slots, len(blocks))
        self._on_gpu = device.type == "cuda"
        layouts = [_layout(block) for block in blocks]
        num_bytes = {size for _, size in layouts}
        if len(num_bytes) != 1 or 0 in num_bytes:
            raise RunError("Streaming needs blocks of one shape with int8 weights", "Use an int8 base_model_precision")
        (size,) = num_bytes
        # Weights that are in host memory already are freed block by block, as their locked copies are filled.
        on_host = sum(getattr(m, n).nbytes for layout, _ in layouts for m, n, _ in layout
                      if getattr(m, n).device.type == "cpu")  # fmt: skip
        check_host_memory(size + max(0, size * len(blocks) - on_host))
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(self.num_slots)]
        self._hosts = [
            self._move(layout, size, self._slots[i % self.num_slots]) for i, (layout, _) in enumerate(layouts)
        ]
        if self._on_gpu:
            weakref.finalize(self, _unlock, self._hosts)
        own_stream = self._on_gpu and streaming.prefetch
        self._copies: Any = torch.cuda.Stream(device) if own_stream else None  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Forget what is in the slots, for example after a pass that failed."""
        self._place_in: list[int | None] = [None] * self.num_slots
        self._arrived: list[Any] = [None] * self.num_slots
        self._free: list[Any] = [None] * self.num_slots
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def start_over(self) -> None:
        """Have the first blocks' weights in the slots and nothing to wait for: so begins and ends a training pass."""
        self.reset()
        for place in range(self.num_slots):
            self.want(place)
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        self._arrived = [None] * self.num_slots

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Have copies begin after what the current stream has to do, and the stream wait for them at the end.

        So a CUDA graph that is captured from the current stream has the copies too. ``reset`` must follow, since a
        captured copy cannot be waited for outside of the graph.
        """
        if self._copies is None:
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        self._copies.wait_stream(stream)
        try:
            yield
        finally:
            stream.wait_stream(self._copies)

    def around(self, policy: BlockPolicy, place: int) -> BlockPolicy:
        """``policy``, which finds the block's weights in place, forward and backward, and then starts the next copy."""

        def streamed(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
            if not torch.is_grad_enabled():
                self.arrive(place)
                result = policy(block, x, *rest)
                following = place + self.num_slots
                if following >= len(self._hosts):  # a picture's next step begins with the first blocks again
                    following = place % self.num_slots
                self.leave(place, following)
                return result
            # A gradient must pass through both, or their backward functions would not run.
            x = x if x.requires_grad else x.detach().requires_grad_()
            entered = _Enter.apply(x, self, place)  # type: ignore[no-untyped-call]
            left: Tensor = _Leave.apply(policy(block, entered, *rest), self, place)  # type: ignore[no-untyped-call]
            return left

        return streamed

    def want(self, place: int) -> None:
        """Start copying a block's weights into its slot, unless they are there. Waits for the slot's last user."""
        slot = place % self.num_slots
        if not 0 <= place < len(self._hosts) or self._place_in[slot] == place:
            return
        self._place_in[slot] = place
        # `.data` bypasses autograd's check for changes: the same bytes are back before the backward pass reads them.
        if not self._on_gpu:
            self._slots[slot].data.copy_(self._hosts[place])
            return
        stream = self._copies or torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            if self._free[slot] is not None:
                stream.wait_event(self._free[slot])
            self._slots[slot].data.copy_(self._hosts[place], non_blocking=True)
            self._arrived[slot] = stream.record_event()

    def arrive(self, place: int) -> None:
        """Make later work on the current stream wait until a block's weights are in place."""
        self.want(place)
        arrived = self._arrived[place % self.num_slots]
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def leave(self, place: int, following: int) -> None:
        """Let the slot of a block whose work is queued be filled with ``following`` once that work is done."""
        if self._on_gpu:
            self._free[place % self.num_slots] = torch.cuda.current_stream(self.device).record_event()
        self.want(following)

    def _move(self, layout: list[tuple[nn.Module, str, int]], size: int, slot: Tensor) -> Tensor:
        """Copy a block's tensors into page-locked memory, side by side, and make them views of the slot."""
        host = torch.empty(size, dtype=torch.uint8)
        if self._on_gpu:
            _page_lock(host)
        for module, name, start in layout:
            tensor: Tensor = getattr(module, name).detach()
            host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            view = slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if isinstance(getattr(module, name), nn.Parameter):
                getattr(module, name).data = view
            else:
                setattr(module, name, view)
        return host


class _Enter(torch.autograd.Function):
    """Before a block: wait for its weights. After its backward pass: free its slot for an earlier block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, streamer: Streamer, place: int) -> Tensor:
        ctx.streamer, ctx.place = streamer, place
        streamer.arrive(place)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.streamer.leave(ctx.place, ctx.place - ctx.streamer.num_slots)
        return grads[0], None, None


class _Leave(torch.autograd.Function):
    """After a block: free its slot for a later block. Before its backward pass: wait for its weights again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, streamer: Streamer, place: int) -> Tensor:
        ctx.streamer, ctx.place = streamer, place
        streamer.leave(place, place + streamer.num_slots)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.streamer.arrive(ctx.place)
        return grads[0], None, None


def check_host_memory(num_bytes: int) -> None:
    """Refuse to page-lock more host memory than is free.

    Raises:
        DoesNotFit: less than ``num_bytes`` and a reserve are free.
    """
    free = free_ram()
    if num_bytes + _HOST_RESERVE > free:
        raise DoesNotFit(
            f"Streaming takes {human_bytes(num_bytes)} of host memory for weights, {human_bytes(free)} is free",
            "Close other programs, or stream less: a lower resolution or batch size leaves more weights on the GPU",
        )


def _layout(block: nn.Module) -> tuple[list[tuple[nn.Module, str, int]], int]:
    """Where each of a block's int8 tensors goes in its buffer, and the buffer's size in bytes.

    Weights of linears that share an input are adjacent, and so are their scales and biases, so that ``block.gather``
    finds them already fused.
    """
    linears = {name: m for name, m in block.named_modules() if isinstance(m, Int8Linear)}
    layout: list[tuple[nn.Module, str, int]] = []
    start = 0
    for leaf in ("weight", "scale", "bias"):
        for name, module in linears.items():
            tensor = getattr(module, leaf)
            if tensor is None:
                continue
            follows = name.removesuffix(".base_layer").rpartition(".")[2] in ("to_key", "to_value")
            start = start if follows else -(-start // _ALIGNMENT) * _ALIGNMENT
            layout.append((module, leaf, start))
            start += tensor.nbytes
    return layout, start


def _page_lock(host: Tensor) -> None:
    """Lock memory in place, because torch's pinned allocator rounds sizes up to a power of two: 105 MB to 134."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    if int(error) != 0:
        raise RunError(
            f"{human_bytes(host.nbytes)} of host memory could not be page-locked (CUDA error {int(error)})",
            "Raise the limit (`ulimit -l unlimited`), or close other programs",
        )


def _unlock(hosts: list[Tensor]) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for host in hosts:
        runtime.cudaHostUnregister(host.data_ptr())
