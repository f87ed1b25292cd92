"""What does a run train on its base? An adapter, its optimizer and its average: attached, saved, restored, removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k5cache.shared import console, interrupt
from k5cache.shared.errors import DoesNotFit, RunError
from k5train.adapter import targets
from k5train.adapter.attach import add_lora
from k5train.adapter.lora_file import refuse_not_finite
from k5train.forward.load import execute
from k5train.forward.predict_velocity import predict_velocity, rotary
from k5train.options.train import TrainConfig
from k5train.parallel.gradients import FlatGradients
from k5train.parallel.ranks import ALONE, Ranks
from k5train.planning.graph import why_no_graph
from k5train.planning.plan import announce, how_to_run, leaner_budget, plan_for
from k5train.runs.resume_state import SavedState, broken
from k5train.training.average import Ema
from k5train.training.base import Base
from k5train.training.computed_by import KEY, check_computed_by, computed_by
from k5train.training.graph import GraphedPasses
from k5train.training.optimizer import make_optimizer, settled
from k5train.training.optimizer_state import optimizer_state, restore_optimizer
from k5train.training.recorder import make_recorder
from k5train.training.step import clip_gradients, compute_on, exploded, loss_function, update

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5train.data.batch import Group
    from k5train.data.mixture import Mixture
    from k5train.forward.execute import Execution


@dataclass(frozen=True)
class Session:
    """An adapter on its base, with its optimizer."""

    base: Base
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    execution: Execution | None
    graphs: GraphedPasses | None = None
    """Does the passes on fixed buffers, captured as CUDA graphs. None: each pass is done as it comes."""
    gradients: FlatGradients | None = None
    """Of a run of several processes. None: each parameter's gradient is a tensor of its own."""
    ranks: Ranks = ALONE

    @property
    def computed_by(self) -> dict[str, Any]:
        """What computes it in this process, as JSON."""
        return computed_by(self.base.device, self.execution)

    def begin(self) -> None:
        """Prepare for the passes of an update."""
        if self.gradients:
            self.gradients.attach()

    def clip(self, max_grad_norm: float) -> Tensor:
        """Clip the gradients; return their norm before, without waiting for it.

        Gradients of several processes are added up first; then it waits, so that a process that died is noticed.
        """
        if self.gradients:
            self.gradients.add_up()
        norm = clip_gradients(list(self.parameters.values()), max_grad_norm)
        if self.gradients:
            self.ranks.wait_for_device()
        return norm

    def update(self, rows: Sequence[int], cache: Mixture, norm: float) -> None:
        """Take one step of the optimizer and of the average.

        Args:
            rows: that the gradients are of.

        Raises:
            RunError: ``norm``, of the gradients, is not finite. The error names the rows, and nothing was updated.
        """
        explain = partial(exploded, rows=rows, cache=cache)
        update(self.optimizer, norm, explain, self.graphs)
        if self.ema:
            self.ema.update()

    def clear_gradients(self) -> None:
        """Forget the gradients of passes that no update follows."""
        if self.graphs:
            self.graphs.clear()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def make_room(self) -> None:
        """Give back the memory of captured steps, before the transformer is used for something else."""
        if self.graphs:
            self.graphs.release()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The adapter as it will be used: a schedule-free optimizer's average. Afterwards every bit is as before."""
        if not hasattr(self.optimizer, "eval"):
            yield
            return
        before = [p.detach().to("cpu", copy=True) for p in self.parameters.values()]  # a captured step holds the GPU's
        try:
            with settled(self.optimizer):
                yield
        finally:  # also at Ctrl-C, whose saved state must have the bits of before
            with interrupt.deferred(), torch.no_grad():
                for parameter, tensor in zip(self.parameters.values(), before, strict=True):
                    parameter.copy_(tensor)

    def parts(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """What ``save_state`` writes, copied to host memory: the tensors of each part, and as JSON what else the
        optimizer has and what computed them.
        """
        tensors, plain = optimizer_state(self.optimizer, list(self.parameters))
        parts: dict[str, Mapping[str, Tensor]] = {"adapter": _copied(self.parameters), "optimizer": tensors}
        plain = {"optimizer": plain, KEY: self.computed_by}
        return parts | ({"ema": _copied(self.ema.state_dict())} if self.ema else {}), plain

    def restore(self, saved: SavedState) -> None:
        """Restore what ``parts`` returned.

        Raises:
            RunError: the files cannot be read, have NaN or infinity, or do not fit this adapter.
        """
        adapter = saved.tensors("adapter")
        if {n: t.shape for n, t in adapter.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise RunError(
                f"{saved.folder} has the state of another adapter than the recipe's",
                "Resume with the recipe that the run started with",
            )
        refuse_not_finite(saved.folder, adapter)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(adapter[name])
        moments, average = saved.tensors("optimizer"), saved.tensors("ema")
        try:
            restore_optimizer(self.optimizer, list(self.parameters), moments, saved.facts["optimizer"])
            if self.ema:
                self.ema.load_state_dict(average)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            raise broken(saved.folder / "optimizer.safetensors", error) from error

    def close(self) -> None:
        """Remove the adapter: the base is as it was."""
        self.make_room()
        self.base.transformer.unload_lora()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def attach(base: Base, config: TrainConfig, saved: SavedState | None, ranks: Ranks = ALONE) -> Session:
    """Attach the recipe's adapter to the base, new or as it was saved.

    Args:
        ranks: the processes that train it together. All begin with the first one's.

    Raises:
        RecipeError: a target matches nothing.
        RunError: the saved state cannot be read or does not fit, or something else computed it and
            the run is deterministic. The base is left without an adapter.
    """
    try:
        return _attach(base, config, saved, ranks)
    except BaseException:
        if getattr(base.transformer, "_hf_peft_config_loaded", False):
            base.transformer.unload_lora()
        raise


def _attach(base: Base, config: TrainConfig, saved: SavedState | None, ranks: Ranks) -> Session:
    start = replace(config.lora, init_lora=None) if saved else config.lora  # the saved state has all of it
    console.note(targets.describe(add_lora(base.transformer, start, config.seed)))
    console.note(f"{config.optim.optimizer} at a learning rate of {config.optim.lr:g}")
    ranks.copy_from_first(p for p in base.transformer.parameters() if p.requires_grad)
    session = session_of(base, config, ranks)
    if saved:
        check_computed_by(saved, session.computed_by, config, ranks, is_tried=False)
        session.restore(saved)
    return session


def session_of(base: Base, config: TrainConfig, ranks: Ranks = ALONE) -> Session:
    """The session of an adapter that is on its base already."""
    parameters = {name: p for name, p in base.transformer.named_parameters() if p.requires_grad}
    gradients = FlatGradients(list(parameters.values()), ranks) if ranks.size > 1 else None
    optimizer = make_optimizer(parameters.values(), config.optim)
    ema = Ema(parameters.values(), config.optim.ema_decay) if config.optim.ema_decay else None
    execution = execute(base.transformer, config, base.device, base.plan, base.any_rank)
    session = Session(base, parameters, optimizer, ema, execution, gradients=gradients, ranks=ranks)
    return replace(session, graphs=_graphs(session, config))


def _graphs(session: Session, config: TrainConfig) -> GraphedPasses | None:
    """What captures the steps of a session; None if the plan or the recipe does not allow it, which is said."""
    base, execution = session.base, session.execution
    reason = why_no_graph(config, base.device.type, how_to_run(config, base.device))
    if reason is None and not base.plan.is_captured:
        reason = _why_not_planned(base, config)
    if reason is None and execution is not None and base.plan.sizes:
        predict, width = partial(predict_velocity, base.transformer), base.plan.sizes[1]
        return GraphedPasses(
            partial(compute_on, predict, loss_function(config)), list(session.parameters.values()), width, base.device,
            make_recorder(base.device, execution.streamer), partial(_rope_of, base.transformer),
            lambda: execution.is_compiled,
        )  # fmt: skip
    if base.device.type == "cuda" and config.memory.graph != "off":
        console.note(f"Steps are not captured as CUDA graphs: {reason}")
    return None


def _why_not_planned(base: Base, config: TrainConfig) -> str:
    """Why the memory plan does not count captured steps: a new one for this run tells."""
    plan = base.plan
    try:
        assert plan.sizes is not None
        new = plan_for(base.transformer.config, config, base.device, plan.sizes, plan.budget)
    except DoesNotFit:
        return "this run has a memory plan that was made for others"
    if new.is_captured:
        return "the memory plan is that of another run of the sweep, or of an earlier version, and does not count them"
    return "the memory plan has no room for them"


def _rope_of(transformer: Kandinsky5Transformer3DModel, group: Group) -> object:
    """The rotations that a captured pass reads. They are made here if they are not there, and not in the capture."""
    sides = zip(group.latents.shape[1:4], transformer.patch_size, strict=True)
    grid = tuple(side // patch for side, patch in sides)
    return rotary(transformer, group.prompt_embeds.shape[1], grid, group.latents.device)


def plan_for_less(session: Session, config: TrainConfig) -> Session | None:
    """The session with a plan for a twelfth less VRAM, after its first step ran out of it.

    Returns:
        None if the recipe fixes what blocks keep, or if no leaner plan can be applied without moving weights.
    """
    base, budget = session.base, leaner_budget(session.base.plan)
    if budget is None or base.plan.sizes is None or config.memory.activations != "auto":
        return None
    try:
        plan = plan_for(base.transformer.config, config, base.device, base.plan.sizes, budget)
    except DoesNotFit:
        return None
    if plan.streaming:
        return None
    console.warn("The first step needed more VRAM than planned: planning for less")
    announce(plan)
    execution = execute(base.transformer, config, base.device, plan, base.any_rank)
    leaner = replace(session, base=replace(base, plan=plan), execution=execution)
    return replace(leaner, graphs=_graphs(leaner, config))
