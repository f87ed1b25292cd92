"""What does a captured step read? A group's tensors, copied into buffers that stay where they are, by its kind."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from k5train.data.batch import Group


def kind_of(group: Group, text_width: int) -> Hashable:
    """What one graph serves: the shapes and dtypes of a group, which fields it has, and its routes.

    The lengths of captions are no part of it: the buffer of captions has a fixed width, and lengths are data.
    """
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in vars(group).items() if isinstance(t, Tensor)}
    batch, num_tokens, width = group.prompt_embeds.shape
    shapes["prompt_embeds"] = ((batch, _fitting(num_tokens, text_width), width), group.prompt_embeds.dtype)
    shapes.pop("text_lengths", None)
    routes = tuple((route.start, route.end, tuple(route.kept.shape)) for route in group.routes)
    return (*sorted(shapes.items()), routes)


class FixedInputs:
    """Buffers on ``device`` for the groups of one kind, and for what a pass over them gives.

    Args:
        like: any group of the kind.
        text_width: tokens that captions have room for. A longer one gets more.
    """

    def __init__(self, like: Group, text_width: int, device: torch.device) -> None:
        def buffer(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

        batch, num_tokens, width = like.prompt_embeds.shape
        rows = (batch, _fitting(num_tokens, text_width), width)
        text = torch.zeros(rows, dtype=like.prompt_embeds.dtype, device=device)
        fields: dict[str, Any] = {n: buffer(t) for n, t in vars(like).items() if isinstance(t, Tensor)}
        fields |= {"prompt_embeds": text, "text_lengths": torch.ones(batch, dtype=torch.int32, device=device)}
        routes = tuple(replace(route, kept=buffer(route.kept)) for route in like.routes)
        self.group = replace(like, **fields, routes=routes)
        """What the pass computes on."""
        self.share = torch.zeros((), device=device)
        """What the gradients of the group's mean loss are multiplied by."""
        self.result = torch.zeros(1 + batch, device=device)
        """The pass's loss, and the error of each row."""

    @property
    def num_elements(self) -> int:
        """A measure of how much a pass over the group keeps."""
        return self.group.latents.numel()

    def fill(self, group: Group, share: float) -> None:
        """Copy a group of this kind into the buffers, without waiting for the GPU."""
        here = self.group
        num_tokens = group.prompt_embeds.shape[1]
        for name, buffer in vars(here).items():
            if isinstance(buffer, Tensor) and name not in ("prompt_embeds", "text_lengths"):
                buffer.copy_(getattr(group, name), non_blocking=True)
        here.prompt_embeds[:, :num_tokens].copy_(group.prompt_embeds, non_blocking=True)
        here.prompt_embeds[:, num_tokens:].zero_()
        for route, given in zip(here.routes, group.routes, strict=True):
            route.kept.copy_(given.kept, non_blocking=True)
        lengths = here.text_lengths
        assert isinstance(lengths, Tensor)
        # Filled, because a copy from host memory that is not page-locked waits for the GPU.
        if group.text_lengths is None:
            lengths.fill_(num_tokens)
        else:
            assert not isinstance(group.text_lengths, Tensor)
            for row, length in enumerate(group.text_lengths):
                lengths[row].fill_(length)
        self.share.fill_(share)


def _fitting(num_tokens: int, text_width: int) -> int:
    return text_width if num_tokens <= text_width else -(-num_tokens // 16) * 16
