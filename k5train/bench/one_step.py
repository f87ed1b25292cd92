"""What is the step that is timed? A run's own, captured or not: passes, clipping and update, on random numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from k5train.data.batch import Batch, Group
from k5train.forward import routing
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.rate import with_usual_rate
from k5train.options.train import TrainConfig
from k5train.planning.memory import Plan
from k5train.training.base import Base
from k5train.training.session import Session, session_of
from k5train.training.step import accumulate, loss_function


class OneStep:
    """An update on one group, again and again.

    Args:
        group: in host memory, as a run's loader has it.
    """

    def __init__(self, session: Session, config: TrainConfig, group: Group) -> None:
        self.session, self.config = session, config
        self.batch = Batch(tuple(range(group.latents.shape[0])), (group,))
        self._predict = partial(predict_velocity, session.base.transformer)
        self._cache: Any = SimpleNamespace(row=lambda number: SimpleNamespace(path="random numbers"))
        session.base.transformer.train()

    def __call__(self) -> float:
        """Take a step; return the norm of the gradients."""
        session, batches = self.session, [self.batch]
        losses = accumulate(self._predict, batches, self._cache, session.base.device, 0.0, loss_function(self.config),
                            None, session.graphs, partial(session.clip, 1.0))  # fmt: skip
        assert losses.norm is not None
        session.update(self.batch.rows, self._cache, losses.norm)
        return losses.norm

    def warm_up(self) -> None:
        """Compile in a pass that changes nothing."""
        if self.session.execution is not None:
            self.session.execution.warm_up(self._pass_once)

    def uncaptured(self) -> float:
        """Take a step whose kernels are launched one by one, so that a profile knows what each is of."""
        self.session.make_room()
        return self()

    def _pass_once(self) -> None:
        (group,) = self.batch.groups
        if self.session.graphs:
            self.session.graphs.try_out(self.batch.groups)
            return
        loss = loss_function(self.config)(self._predict, group.to(self.session.base.device))
        torch.autograd.backward(loss)
        self.session.clear_gradients()


def make_session(transformer: Any, config: TrainConfig, device: torch.device, plan: Plan) -> Session:
    """The session of a run on a transformer that has its adapter."""
    return session_of(Base(transformer, device, plan), with_usual_rate(config))


def group_of(
    inputs: tuple[Tensor, ...],
    routes: tuple[routing.Route, ...] = (),
    condition: Tensor | None = None,
) -> Group:
    """A group of given inputs and random noise, in host memory: page-locked if the inputs are on a GPU."""
    latents, sigma, text, pooled = inputs
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    group = Group(latents, noise, sigma, text, pooled, condition=condition, routes=routes)
    host = replace(group.to(torch.device("cpu")), noise=noise)
    if latents.is_cuda:
        torch.cuda.synchronize()  # the copies to the host
        return host.pin()
    return host
