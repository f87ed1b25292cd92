"""What does a captured step read? The tensors of a micro-batch, copied into buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from k5train.data.batch import Group


def kind_of(groups: Sequence[Group], text_width: int) -> Hashable:
    """What one graph serves: the shapes and dtypes of a micro-batch's rows, which fields they have, and their routes.

    The lengths of captions are no part of it: the buffer of captions has a fixed width, and lengths are data. So into
    how many groups they part the rows does not matter either.
    """
    first, rows = groups[0], _num_rows(groups)
    shapes = {n: ((rows, *t.shape[1:]), t.dtype) for n, t in vars(first).items() if isinstance(t, Tensor)}
    text = first.prompt_embeds
    shapes["prompt_embeds"] = ((rows, _fitting(groups, text_width), text.shape[2]), text.dtype)
    shapes.pop("text_lengths", None)
    routes = tuple((route.start, route.end, (rows, *route.kept.shape[1:])) for route in first.routes)
    return (*sorted(shapes.items()), routes)


class Buffers:
    """Memory on ``device`` that kinds share: one is computed at a time, so a field is stored once, at its largest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._whole: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros of this shape, in memory that stays where it is. A later kind overwrites them."""
        count = torch.Size(shape).numel()
        whole = self._whole.get((name, dtype))
        if whole is None or whole.numel() < count:
            whole = self._whole[name, dtype] = torch.zeros(count, dtype=dtype, device=self.device)
        return whole[:count].view(*shape)


class FixedInputs:
    """Buffers for the micro-batches of one kind, and for what a pass over them gives.

    Args:
        like: the groups of any micro-batch of the kind.
        text_width: tokens that captions have room for. A longer one gets more.
    """

    def __init__(self, like: Sequence[Group], text_width: int, buffers: Buffers) -> None:
        first, rows = like[0], _num_rows(like)

        def buffer(name: str, tensor: Tensor) -> Tensor:
            return buffers.take(name, (rows, *tensor.shape[1:]), tensor.dtype)

        text = first.prompt_embeds
        shape = (rows, _fitting(like, text_width), text.shape[2])
        fields: dict[str, Any] = {n: buffer(n, t) for n, t in vars(first).items() if isinstance(t, Tensor)}
        fields["prompt_embeds"] = buffers.take("prompt_embeds", shape, text.dtype)
        # Not shared, so that they always fit the kind's own sizes: kernels read where they say.
        fields["text_lengths"] = torch.ones(rows, dtype=torch.int32, device=buffers.device)
        kept = [
            replace(r, kept=torch.zeros(rows, *r.kept.shape[1:], dtype=r.kept.dtype, device=buffers.device))
            for r in first.routes
        ]
        self.group = replace(first, **fields, routes=tuple(kept))
        """What the pass computes on: the rows of all groups, with their captions padded."""
        self.share = torch.zeros((), device=buffers.device)
        """What the gradients of the rows' mean loss are multiplied by."""
        self.result = torch.zeros(1 + rows, device=buffers.device)
        """The pass's loss, and the error of each row."""

    @property
    def num_elements(self) -> int:
        """A measure of how much a pass over the rows keeps."""
        return self.group.latents.numel()

    def fill(self, groups: Sequence[Group], share: float) -> None:
        """Copy the groups of a micro-batch of this kind into the buffers, without waiting for the GPU."""
        at = 0
        for group in groups:
            rows = slice(at, at + len(group.latents))
            self._fill_rows(rows, group)
            at = rows.stop
        self.share.fill_(share)

    def _fill_rows(self, rows: slice, group: Group) -> None:
        here = self.group
        for name, buffer in vars(here).items():
            if isinstance(buffer, Tensor) and name not in ("prompt_embeds", "text_lengths"):
                buffer[rows].copy_(getattr(group, name), non_blocking=True)
        num_tokens = group.prompt_embeds.shape[1]
        here.prompt_embeds[rows, :num_tokens].copy_(group.prompt_embeds, non_blocking=True)
        here.prompt_embeds[rows, num_tokens:].zero_()
        for route, given in zip(here.routes, group.routes, strict=True):
            route.kept[rows].copy_(given.kept, non_blocking=True)
        lengths = here.text_lengths
        assert isinstance(lengths, Tensor)
        # Filled, because a copy from host memory that is not page-locked waits for the GPU.
        if group.text_lengths is None:
            lengths[rows].fill_(num_tokens)
        else:
            assert not isinstance(group.text_lengths, Tensor)
            for row, length in enumerate(group.text_lengths, rows.start):
                lengths[row].fill_(length)


def _num_rows(groups: Sequence[Group]) -> int:
    return sum(len(group.latents) for group in groups)


def _fitting(groups: Sequence[Group], text_width: int) -> int:
    num_tokens = max(group.prompt_embeds.shape[1] for group in groups)
    return text_width if num_tokens <= text_width else -(-num_tokens // 16) * 16
