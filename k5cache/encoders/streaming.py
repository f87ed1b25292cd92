"""How do 7 billion parameters encode captions in 4 GB? Layer by layer over many captions: each weight is read once.

All captions of a chunk pass layer i while layer i+1 is read. Between layers, hidden states are parked on the device if
they fit, else in pinned host memory.

A chunk is as many captions as may be parked (``memory_plan``). Parking more of them on disk would be slower: each layer
reads and writes the parked states, 56 times their size in all, while one more chunk costs one more read of 13 GB of
weights. From 0.25 GB of states (160 captions) on, the disk would do more work. A chunk's rows are committed when it is
done, so a crash loses at most a chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from k5cache.encoders.hostio import fetched, new_stream, record_event
from k5cache.encoders.layers import Pack, attention_kernels, make_packs, run_layer
from k5cache.encoders.memory_plan import Parking
from k5cache.encoders.qwen import (
    Pictures,
    Qwen,
    Tokens,
    cropped,
    embedded,
    finish_layer,
    positions_of,
    raw_layers,
    read_layers,
)

if TYPE_CHECKING:
    import torch


def stream_prompt_embeds(
    qwen: Qwen,
    tokens: Sequence[Tokens],
    pictures: Pictures | None = None,
    *,
    exact: bool = True,
    batch_tokens: int = 8192,
    parking: Parking = "device",
    on_layer: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """``qwen.iter_prompt_embeds`` with layers read from their files: the same forward passes, so the same bits.

    Args:
        qwen: loaded with ``streamed=True``.
        tokens: one chunk. Each token parks 7 KB.
        pictures: as in ``iter_prompt_embeds``.
        parking: where hidden states wait for their next layer.
        on_layer: called with the number of each layer as it begins.

    Yields:
        (position, ``[n_tokens, 3584]`` on the CPU), after the last layer.
    """
    import torch

    packs = make_packs([len(t.ids) for t in tokens], 1 if exact else batch_tokens)
    if not packs:
        return
    with torch.no_grad(), attention_kernels(exact):
        positions = positions_of(qwen, tokens)
        is_away = parking == "host" and qwen.device.type == "cuda" and len(packs) > 1
        parked = (_OnHost if is_away else _OnDevice)(qwen, packs)
        for k, pack in enumerate(packs):
            parked.put(k, embedded(qwen, tokens, pictures, pack))
        for i, layer in enumerate(read_layers(qwen, reuse=True)):
            if on_layer:
                on_layer(i)
            for k, pack in enumerate(packs):
                parked.put(k, run_layer(layer, parked.take(k), positions.of(pack), pack.runs))
        normed = ((pack, qwen.model.norm(parked.take(k))[0]) for k, pack in enumerate(packs))
        for pack, rows in fetched(normed):
            yield from cropped(qwen, pack, rows)


def int8_error(qwen: Qwen, tokens: Sequence[Tokens], pictures: Pictures | None = None) -> float:
    """The error of int8 weights: norm of the difference over the norm, of all embeddings together.

    Each layer runs twice, with the weights of the file and with int8, so neither model is ever whole in memory.

    Args:
        qwen: loaded with ``streamed=True``.
        tokens: a few captions.
    """
    import torch

    with torch.no_grad():
        positions = positions_of(qwen, tokens)
        packs = make_packs([len(t.ids) for t in tokens], 1)
        plain = [embedded(qwen, tokens, pictures, pack) for pack in packs]
        rounded = list(plain)
        for skeleton, tensors in raw_layers(qwen, reuse=True):
            for int8, states in ((False, plain), (True, rounded)):
                layer = finish_layer(qwen, skeleton, tensors, int8=int8)
                for k, pack in enumerate(packs):
                    states[k] = run_layer(layer, states[k], positions.of(pack), pack.runs)
        expected, in_int8 = (
            torch.cat([qwen.model.norm(s)[0, qwen.encode_start_idx :].double() for s in states])
            for states in (plain, rounded)
        )
        return float((in_int8 - expected).norm() / expected.norm())


class _OnDevice:
    """Hidden states of every pack in the memory of the device."""

    def __init__(self, qwen: Qwen, packs: Sequence[Pack]) -> None:
        import torch

        total = sum(pack.num_tokens for pack in packs)
        memory = torch.empty(1, total, qwen.embeddings.shape[1], dtype=qwen.dtype, device=qwen.device)
        self._parts = torch.split(memory, [pack.num_tokens for pack in packs], dim=1)

    def put(self, k: int, states: torch.Tensor) -> None:
        self._parts[k].copy_(states)

    def take(self, k: int) -> torch.Tensor:
        return self._parts[k]


class _OnHost:
    """Hidden states of every pack in pinned memory. A pack is copied in while the one before it is computed.

    One stream does all copies in this order: copy k+1 in, copy k out. So a pack was copied out before it is copied in
    again, if there are at least two packs.
    """

    def __init__(self, qwen: Qwen, packs: Sequence[Pack]) -> None:
        import torch

        self._device = qwen.device
        self._copies = new_stream(self._device)
        total = sum(pack.num_tokens for pack in packs)
        memory = torch.empty(1, total, qwen.embeddings.shape[1], dtype=qwen.dtype, pin_memory=True)
        self._parts = torch.split(memory, [pack.num_tokens for pack in packs], dim=1)
        self._ahead: tuple[int, torch.Tensor, Any] | None = None
        self._leaving: deque[Any] = deque()

    def put(self, k: int, states: torch.Tensor) -> None:
        import torch

        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._parts[k].copy_(states, non_blocking=True)
            self._leaving.append(record_event(self._device))
        states.record_stream(self._copies)
        # A pack that is being copied out still takes memory: at most three are queued.
        if len(self._leaving) > 3:
            self._leaving.popleft().synchronize()

    def take(self, k: int) -> torch.Tensor:
        import torch

        _, states, brought = self._ahead if self._ahead and self._ahead[0] == k else self._bring(k)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(brought)
        states.record_stream(compute)
        self._ahead = self._bring((k + 1) % len(self._parts))
        return states

    def _bring(self, k: int) -> tuple[int, torch.Tensor, Any]:
        import torch

        with torch.cuda.stream(self._copies):
            return k, self._parts[k].to(self._device, non_blocking=True), record_event(self._device)
