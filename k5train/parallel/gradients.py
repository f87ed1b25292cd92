"""Where are the gradients of a run on several GPUs? In one flat tensor, so that one all-reduce adds up all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k5train.parallel.ranks import Ranks


class FlatGradients:
    """One tensor with the gradients of all parameters, which have views of it as their ``grad``.

    It takes the memory that the gradients would take.

    Args:
        parameters: of one dtype, on one device.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = list(parameters), ranks
        first = self._parameters[0]
        assert all((p.dtype, p.device) == (first.dtype, first.device) for p in self._parameters)
        self.flat = torch.zeros(sum(p.numel() for p in self._parameters), dtype=first.dtype, device=first.device)
        sizes = [p.numel() for p in self._parameters]
        self._views = [v.view_as(p) for v, p in zip(torch.split(self.flat, sizes), self._parameters, strict=True)]
        self.attach()

    def attach(self) -> None:
        """Give parameters whose gradients were cleared away their views again, full of zeros."""
        if any(p.grad is not view for p, view in zip(self._parameters, self._views, strict=True)):
            self.flat.zero_()
            for parameter, view in zip(self._parameters, self._views, strict=True):
                parameter.grad = view

    def add_up(self) -> None:
        """Replace the gradients by their sums over all processes."""
        self._ranks.add_up(self.flat)
