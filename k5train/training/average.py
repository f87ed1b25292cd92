"""The exponential moving average of the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """An exponential moving average of the adapter, float32, beside it.

    The decay rises to its final value as ``(1 + n) / (10 + n)``, as in diffusers' ``EMAModel``: early averages forget
    the start.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.num_updates = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an update."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.num_updates else 0.0
        self.num_updates += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The average in the parameters' place, and the parameters back afterwards."""
        trained = [p.data for p in self.parameters]
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, tensor in zip(self.parameters, trained, strict=True):
                parameter.data = tensor

    def state_dict(self) -> dict[str, Tensor]:
        """The average by position, and the number of updates."""
        return {"num_updates": torch.tensor(self.num_updates), **{str(i): t for i, t in enumerate(self.average)}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``."""
        self.num_updates = int(state["num_updates"])
        for i, average in enumerate(self.average):
            average.copy_(state[str(i)])
