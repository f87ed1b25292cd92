"""What one run trains on a base: its adapter and optimizer, put on, saved, brought back, and taken off again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k5cache import console
from k5cache.errors import DoesNotFit, RunError
from k5cache.fingerprint import fingerprint
from k5cache.recipe import to_dict
from k5train import lora, state
from k5train.config import TrainConfig
from k5train.kept import Kept, kept_plan
from k5train.optim import Ema, make_optimizer, settled
from k5train.ready import announce, execute, largest, less, load, plan_for, plan_training
from k5train.step import exploded, update

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5train.base.execute import Execution
    from k5train.base.memory import Plan
    from k5train.data import Batch
    from k5train.mixture import Mixture

# What may change between a run and its resumption: none of it changes the numbers of a step, but for the rounding of
# another memory plan. ``may_change`` makes exceptions for what the run is.
FREE = (
    "name",
    "steps",
    "epochs",
    "max_hours",
    "checkpoint_every",
    "checkpoints_total_limit",
    "loss_limit",
    "device",
    "memory",
    "trackers",
    *(f"validation.{name}" for name in ("prompts", "negative_prompt", "every", "guidance_scale", "num_inference_steps",
      "width", "height", "seed", "before", "held_out_every", "patience")),
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A frozen transformer on its device, ready for one adapter after another."""

    transformer: Kandinsky5Transformer3DModel
    device: torch.device
    plan: Plan
    any_rank: bool = False
    """Its adapters are of several ranks: they are compiled for once."""


@dataclass(frozen=True)
class Session:
    """An adapter on its base, and what updates it."""

    base: Base
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    execution: Execution | None

    def update(self, batches: Sequence[Batch], cache: Mixture, max_grad_norm: float) -> float:
        """One step of the optimizer, and of the average. Returns the gradients' norm.

        Raises:
            RunError: it is not finite; the rows are named and nothing was updated.
        """
        explain = partial(exploded, batches=batches, cache=cache)
        norm = update(self.optimizer, list(self.parameters.values()), max_grad_norm, explain)
        if self.ema:
            self.ema.update()
        return norm

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The adapter as it is to be used: a schedule-free optimizer's average; afterwards every bit as before."""
        if not hasattr(self.optimizer, "eval"):
            yield
            return
        before = [p.detach().clone() for p in self.parameters.values()]
        with settled(self.optimizer):
            yield
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters.values(), before, strict=True):
                parameter.copy_(tensor)

    def parts(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """What ``state.save_state`` writes of it: tensors by part, and the optimizer's plain values."""
        tensors, plain = state.optimizer_state(self.optimizer, list(self.parameters))
        parts: dict[str, Mapping[str, Tensor]] = {"adapter": self.parameters, "optimizer": tensors}
        return parts | ({"ema": self.ema.state_dict()} if self.ema else {}), {"optimizer": plain}

    def restore(self, saved: state.Saved) -> None:
        """Bring back what ``parts`` gave.

        Raises:
            RunError: the files do not fit this adapter.
        """
        adapter = saved.tensors("adapter")
        if {n: t.shape for n, t in adapter.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise RunError(
                f"{saved.folder} holds another adapter than the recipe makes",
                "Resume with the recipe that the run started with",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(adapter[name])
        state.restore_optimizer(
            self.optimizer, list(self.parameters), saved.tensors("optimizer"), saved.facts["optimizer"]
        )
        if self.ema:
            self.ema.load_state_dict(saved.tensors("ema"))

    def close(self) -> None:
        """Take the adapter off: the base is as it was."""
        self.base.transformer.unload_lora()


def load_base(
    data: Mixture, folder: Path, config: TrainConfig, device: torch.device, any_rank: bool = False,
    kept: Kept | None = None,
) -> Base:  # fmt: skip
    """Plan, say so, and load the frozen transformer.

    Args:
        any_rank: its adapters will be of several ranks.
        kept: the plan, where a run goes on that is to end with the same bits.

    Raises:
        DoesNotFit: no plan fits, or not the kept one; found before anything is loaded.
    """
    plan = plan_training(folder, config, device, largest(*(source.cache for source in data.sources)), kept)
    console.note(f"Loading the transformer ({config.base_model_precision}) on {device}")
    announce(plan)
    return Base(load(folder, config, device, plan), device, plan, any_rank)


def follow(base: Base, kept: Kept | None) -> Base:
    """A shared base for a run that goes on with a plan of its own, if it does.

    Raises:
        DoesNotFit: there is less VRAM than that takes.
        RunError: weights would have to move.
    """
    if kept is None:
        return base
    plan = kept.within(base.plan.budget)
    if plan.streaming != base.plan.streaming:
        raise RunError(
            f"{kept.run} goes on exactly only with other weights streamed than this base has",
            f"Go on with it alone: {console.command('k5train', 'resume', kept.run)}",
        )
    return replace(base, plan=plan)


def attach(base: Base, config: TrainConfig, saved: state.Saved | None) -> Session:
    """Put the recipe's adapter on the base, at its start or as it was saved.

    Raises:
        RecipeError: a target matches nothing.
        RunError: the saved state cannot be read or does not fit.
    """
    try:
        return _attach(base, config, saved)
    except BaseException:
        if getattr(base.transformer, "_hf_peft_config_loaded", False):
            base.transformer.unload_lora()
        raise


def _attach(base: Base, config: TrainConfig, saved: state.Saved | None) -> Session:
    console.note(lora.describe(lora.add_lora(base.transformer, config.lora, config.seed)))
    parameters = {name: p for name, p in base.transformer.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters.values(), config.optim)
    ema = Ema(parameters.values(), config.optim.ema_decay) if config.optim.ema_decay else None
    made = execute(base.transformer, config, base.device, base.plan, base.any_rank)
    session = Session(base, parameters, optimizer, ema, made)
    if saved:
        session.restore(saved)
    return session


def leaner(session: Session, config: TrainConfig, data: Mixture) -> Session | None:
    """The session with a plan for a twelfth less VRAM: what the first step found missing.

    Returns:
        None where the recipe fixes what is kept, or where weights would have to move.
    """
    base, budget = session.base, less(session.base.plan)
    if budget is None or config.memory.activations != "auto":
        return None
    sizes = largest(*(source.cache for source in data.sources))
    try:
        again = plan_for(base.transformer.config, config, base.device, sizes, budget)
    except DoesNotFit:
        return None
    if again.streaming:
        return None
    console.warn("The first step needed more VRAM than planned: planning for less")
    announce(again)
    execution = execute(base.transformer, config, base.device, again, base.any_rank)
    return replace(session, base=replace(base, plan=again), execution=execution)


def identity(data: Mixture, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a run to go on: the recipe, the caches' rows, and the base model's weights."""
    caches = {}
    for number, source in enumerate(data.sources):
        manifest = source.cache.manifest
        caches[f"cache{number or ''}"] = {
            "images": len(source.cache),
            "rows": _rows(source.cache),
            "recipe": manifest.recipe,
        }
    return {"train": to_dict(config), **caches, "transformer": fingerprint(folder, "transformer")}


def check_same(saved: state.Saved, now: Mapping[str, Any]) -> None:
    """Refuse to go on with anything that changes the numbers.

    Raises:
        RunError: names every field that differs.
    """
    before, now = _without_paths(saved.facts["identity"]), _without_paths(now)
    free = [f"train.{name}" for name in may_change(saved, now["train"])]
    # A name, which an encode may note later; the weights that it stands for are compared by their fingerprints.
    free += [f"{name}.recipe.model.revision" for name in now if name.startswith("cache")]
    differing = state.differences(before, dict(now), free)
    for i, (field, _, _) in enumerate(line.partition(": ") for line in differing):
        if field.endswith(".rows"):  # two hashes say nothing
            differing[i] = f"{field.removesuffix('.rows')}: its images or captions are others now"
    if differing:
        raise RunError(
            f"The run in {saved.folder.parent.parent} was started differently: {'; '.join(differing)}",
            "Put that back to go on with it, or train another: k5train run --new, or -o OTHER",
        )


def _without_paths(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, wherever its caches lie: their rows are compared."""
    train = dict(identity["train"])
    train["data"] = [{k: v for k, v in entry.items() if k != "cache"} for entry in train.get("data", ())]
    return {**identity, "train": train}


def may_change(saved: state.Saved, train: Mapping[str, Any]) -> set[str]:
    """Fields of ``[train]`` that may be others than they were, with all below them.

    Args:
        train: the recipe as it is now.
    """
    free = set(FREE)
    if depends_on_the_last_step(train):
        free -= {"steps", "epochs"}
    if kept_plan(saved, train["deterministic"]):
        free = free - {"memory"} | {"memory.vram"}  # how much there is, and no longer what is made of it
    if not train["deterministic"]:
        free.add("deterministic")  # it goes on, and no longer to the bit
    return free


def depends_on_the_last_step(train: Mapping[str, Any]) -> bool:
    """A schedule or a ramp that ends with the last step was another one all along if that step moves."""
    return bool(
        train["optim"]["lr_scheduler"] != "constant" or (train["tread"]["routes"] and train["tread"]["ramp_down"])
    )


def _rows(cache: Any) -> str:
    """One hash of which latents and captions the rows have, in their order."""
    columns = cache.columns("latent_key", "caption_keys", "mask_key")
    digest = hashlib.sha256()
    for column in columns.columns:
        digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:32]


class Clock:
    """Seconds that a run took, earlier attempts included."""

    def __init__(self, spent: float) -> None:
        self._start = time.monotonic() - spent

    def seconds(self) -> float:
        """Until now."""
        return time.monotonic() - self._start
