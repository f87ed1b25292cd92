"""The exponential moving average of the adapter, which a run can save beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from k5cache.shared import interrupt


class Ema:
    """An exponential moving average of the adapter, in float32.

    The decay rises to its final value as ``(1 + n) / (10 + n)``, as in diffusers' ``EMAModel``, so that early averages
    forget the start.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.num_updates = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters after an update to the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.num_updates else 0.0
        self.num_updates += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average in the place of the parameters, and the parameters back afterwards."""
        trained = [p.data for p in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.data = average
            yield
        finally:  # a state that Ctrl-C saves must have the parameters and not the average
            with interrupt.deferred():
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
