"""How do the passes of a run become CUDA graphs? One for each kind of batch, on fixed buffers; and one for the update.

The same function computes on the same buffers whether it is captured or not, so its bits are the same: where capturing
fails, a run goes on without it and a run that resumes does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from k5cache.shared import console, interrupt
from k5cache.shared.errors import K5Error
from k5train.data.batch import Group
from k5train.training.fixed_inputs import Buffers, FixedInputs, kind_of
from k5train.training.recorder import Recorder, Work

MOST_KINDS = 16
"""Kinds of batches of which each has a graph: the sizes of pictures, times the numbers of rows. A bucket has full
batches and one that has what is left, so this is enough for eight buckets."""


class GraphedPasses:
    """The forward and backward passes of a run, and its updates.

    Gradients add up in place, in tensors that are there from the start. The first pass of a kind is done uncaptured,
    which compiles and loads what it needs; the second time the kind is met, all kinds are captured, the largest first,
    so that the others find room in what it needs. A pass at a new size needs the memory that graphs hold: they are
    given back and captured again, which takes less than half a second each.

    Args:
        compute: takes a group on the device, the rows of a micro-batch, and the share of its mean loss; adds to the
            gradients and returns the loss and the rows' errors, ``[1 + B]``. It must not read the tensors on the host.
        parameters: what is trained.
        text_width: tokens that captions have room for.
        recorder: captures, or on a CPU does work again.
        prepare: called with a group before it is captured; what it returns stays alive as long as its graph.
        may_capture: whether the passes can be captured now. Compiling may have failed.
    """

    def __init__(
        self,
        compute: Callable[[Group, Tensor], Tensor],
        parameters: Sequence[torch.nn.Parameter],
        text_width: int,
        device: torch.device,
        recorder: Recorder,
        prepare: Callable[[Group], object] = lambda group: None,
        may_capture: Callable[[], bool] = lambda: True,
    ) -> None:
        self._compute, self._parameters = compute, list(parameters)
        self._text_width, self._buffers, self._recorder = text_width, Buffers(device), recorder
        self._prepare, self._may_capture = prepare, may_capture
        self._inputs: dict[Hashable, FixedInputs] = {}
        self._known: set[Hashable] = set()
        """The kinds of which a pass was done."""
        self._replays: dict[Hashable, Work] = {}
        self._kept_alive: list[object] = []
        self._update: tuple[torch.optim.Optimizer, Work] | None = None
        self._may_capture_update = True
        self._is_off = False
        self._is_settled = False
        """A training pass was done since something else ran, so that what a pass prepares on the host is there."""
        for parameter in self._parameters:
            # Those that are there may be views of one tensor, which several processes add up.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()

    @property
    def is_off(self) -> bool:
        """Whether nothing is captured any more. Passes are then launched kernel by kernel."""
        return self._is_off

    @property
    def num_graphs(self) -> int:
        """Kinds that are captured now."""
        return len(self._replays)

    def run(self, groups: Sequence[Group], share: float) -> Tensor:
        """Add the gradients of a micro-batch to ``parameter.grad`` in one pass, without waiting for the GPU.

        Args:
            groups: in host memory or on the device, of any kind; all with the same fields. Their captions are padded.
            share: what the gradients of the rows' mean loss are multiplied by.

        Returns:
            ``[1 + B]`` on the device: the loss, and the error of each row, in the order of the groups.
        """
        kind = kind_of(groups, self._text_width)
        inputs = self._inputs_of(kind, groups)
        inputs.fill(groups, share)
        if kind not in self._replays and kind in self._known and self._can_capture():
            self._capture_all()
        if kind in self._replays:
            self._replays[kind]()
        else:
            self._give_back()
            self._pass(inputs)
            self._known.add(kind)
            self._is_settled = True
        return inputs.result.clone()

    def try_out(self, groups: Sequence[Group]) -> None:
        """Do a pass of a micro-batch's kind that changes nothing, unless one was done."""
        if kind_of(groups, self._text_width) in self._known:
            return
        try:
            self.run(groups, 0.0)
        finally:
            self.clear()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step of the optimizer and clear the gradients."""
        if self._update and self._update[0] is optimizer:
            self._update[1]()
            return
        if self._replays and self._may_capture_update and can_be_captured(optimizer):
            self._capture_update(optimizer)
        if self._update:
            self._update[1]()
        else:
            self._step(optimizer)

    def clear(self) -> None:
        """Set the gradients to 0, in place."""
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])

    def release(self) -> None:
        """Give back the graphs' memory, before something else runs: pictures, or a held-out loss."""
        self._give_back()
        self._is_settled = False

    def give_up(self, reason: str) -> None:
        """Capture nothing from now on, and say so once."""
        if not self._is_off:
            console.warn(f"Steps run without a CUDA graph from now on, with the same numbers: {reason}")
        self._is_off = True
        self._drop()  # also the memory of a capture that broke off, which is in none of the graphs

    def _inputs_of(self, kind: Hashable, groups: Sequence[Group]) -> FixedInputs:
        if kind not in self._inputs:
            if len(self._inputs) >= MOST_KINDS:
                self.give_up(
                    f"batches are of more than {MOST_KINDS} kinds, sizes of pictures times numbers of rows. A smaller"
                    " train.batch_size, whole numbers of repeats or fewer sizes in the cache make fewer"
                )
                oldest = next(iter(self._inputs))
                del self._inputs[oldest]
                self._known.discard(oldest)
            self._inputs[kind] = FixedInputs(groups, self._text_width, self._buffers)
        return self._inputs[kind]

    def _can_capture(self) -> bool:
        return self._is_settled and not self._is_off and self._may_capture()

    def _pass(self, inputs: FixedInputs) -> None:
        inputs.result.copy_(self._compute(inputs.group, inputs.share))

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        self.clear()

    def _capture_all(self) -> None:
        """Capture the kinds that are known. Where that fails, nothing is captured from then on."""
        self._give_back()
        known = [(kind, inputs) for kind, inputs in self._inputs.items() if kind in self._known]
        failure = None
        with interrupt.deferred():  # a capture that is cut short spoils the context
            try:
                for kind, inputs in sorted(known, key=lambda item: -item[1].num_elements):
                    self._kept_alive.append(self._prepare(inputs.group))
                    self._replays[kind] = self._recorder.record(partial(self._pass, inputs))
            except K5Error:
                raise
            except Exception as error:  # the driver, the allocator and libraries each refuse in their own way
                failure = _in_words(error)
        if failure:  # not in the handler: the error keeps the pass's memory alive
            self.give_up(failure)

    def _capture_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Capture the update too. It takes no memory to speak of and is kept with the graphs of the passes."""
        with interrupt.deferred():
            try:
                self._update = (optimizer, self._recorder.record(partial(self._step, optimizer)))
            except K5Error:
                raise
            except Exception as error:  # as in _capture_all
                self._may_capture_update = False
                console.warn(f"The optimizer runs without a CUDA graph: {_in_words(error)}")

    def _give_back(self) -> None:
        if self._replays or self._update:
            self._drop()

    def _drop(self) -> None:
        self._replays.clear()
        self._kept_alive.clear()
        self._update = None
        self._recorder.release()


def can_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step is the same work every time: its state is there, and its numbers are on the GPU."""
    groups = optimizer.param_groups
    has_state = all(p in optimizer.state for group in groups for p in group["params"])
    return has_state and all(group.get("capturable") and isinstance(group["lr"], Tensor) for group in groups)


def _in_words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "there is not enough memory to capture it"
    lines = (str(error).strip() or "no message").splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}"
