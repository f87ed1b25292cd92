"""The training loop: what happens at each step, why a run ends, and what is saved when."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext, suppress
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress as Bars
from torch import Tensor

from k5cache.shared import console, interrupt
from k5train.adapter import files
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture
from k5train.data.prefetch import prefetch
from k5train.forward.predict_velocity import predict_velocity
from k5train.forward.without_adapter import adapter_layers, without_adapter
from k5train.objective import flow
from k5train.objective.rollout import Cost
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, RankLost, Ranks
from k5train.planning.saved_plan import SavedPlan, plan_facts, read_saved_plan
from k5train.runs import requests
from k5train.runs.folder import Run
from k5train.runs.metrics import Metrics, Unwritten
from k5train.runs.resume_state import Progress, SavedState, latest_state, same_command, save_state
from k5train.runs.trackers import open_trackers
from k5train.runs.written import recorded
from k5train.training.beside import MOST_COPIES, Beside
from k5train.training.clock import Clock
from k5train.training.computed_by import check_computed_by
from k5train.training.fields import cost_of_rollouts, memory_of, prodigy_of, rows_of, steps_of, tail_mean
from k5train.training.graph import MOST_KINDS
from k5train.training.metadata import metadata
from k5train.training.optimizer import learning_rate, set_rate
from k5train.training.out_of_memory import when_memory_ends
from k5train.training.session import Session, plan_for_less
from k5train.training.step import accumulate, by_sigma, loss_function, preservation_loss, seed_dropout, train_step
from k5train.training.validation import Validation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from k5train.data.batch import Batch, Group


class Loop:
    """A run's steps, and what is saved on the way.

    Args:
        progress: how far the run is. The loop updates it.
        run_identity: what must be the same for the run to go on, saved with its state.
        saved: where the run goes on. None: it begins.
        ranks: the processes that train together.
        facts: what else is saved with the state.
        accepted: called on the first process when nothing more can be refused, before anything of the run is changed.
    """

    def __init__(
        self, data: Mixture, config: TrainConfig, run: Run, session: Session, loader: Loader, validation: Validation,
        progress: Progress, run_identity: dict[str, Any], saved: SavedState | None, ranks: Ranks = ALONE,
        facts: Mapping[str, Any] | None = None, accepted: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.accepted = accepted
        self.data, self.config, self.run, self.session = data, config, run, session
        self.loader, self.validation, self.progress, self.run_identity = loader, validation, progress, run_identity
        self.saved, self.ranks, self.facts = saved, ranks, dict(facts or {})
        self.transformer, self.device = session.base.transformer, session.base.device
        self.predict = partial(predict_velocity, self.transformer)
        self.cost = Cost()
        self.loss_of = loss_function(config, self.cost)
        weight = config.objective.preservation_weight
        self.preserve = (weight, self.predict_base) if weight else None
        self.layers = adapter_layers(self.transformer) if weight else []
        self.clock = Clock(progress.seconds)
        self.losses: list[float] = []
        self.metrics: Metrics | None = None  # until nothing more can be refused: it cuts off what follows a state
        self.is_between_updates = True
        """The adapter and the optimizer are those of ``progress.step``."""
        self.ready = time.monotonic()
        """When the first step could begin."""
        self.beside = Beside(self.device.type == "cuda")

    def run_to_end(self) -> str:
        """Train until there is a reason to end, and return it."""
        with (
            interrupt.installed(),
            console.progress() as bars,
            ExitStack() as opened,
            when_memory_ends(
                lambda: self.session.base.plan, lambda: self.save_after_error(self.metrics), self.go_on, self.saved_plan
            ),
        ):
            try:
                with console.doing(bars, "preparing the first step"):
                    self.warm_up()
                own = self.session.computed_by
                self.facts |= check_computed_by(self.saved, own, self.config, self.ranks, is_tried=True)
                self.metrics = opened.enter_context(self.open_metrics())
                self.ready = time.monotonic()
                return self.steps(bars, self.metrics)
            except KeyboardInterrupt as stopped:
                saved = self.save_stopped(self.metrics)
                raise KeyboardInterrupt(f"Stopped{saved}. Go on with: {self.go_on()}") from stopped
            except RankLost as lost:
                if not self.ranks.is_first:
                    raise  # it is the first process that saves, and says so
                ended = f"{lost.problem}. The run has ended{self.save_stopped(self.metrics)}"
                told = RankLost(ended, f"{lost.fix}. Go on with: {self.go_on()}")
                told.is_told = lost.is_told
                raise told from lost
            except Exception:
                self.beside.finish()
                raise
            finally:
                # Before a run out of memory saves. Whoever closes the session has another one, if it planned for less.
                self.session.make_room()

    def go_on(self, **options: object) -> str:
        """The command that goes on with the run."""
        command = partial(console.command, "k5train", "resume") if self.metrics else same_command
        return command(self.run.root, gpus=self.ranks.gpus, **options)

    def open_metrics(self) -> Metrics:
        """Begin to change the run. Its measurements, as all of it, are written by the first of several processes."""
        if not self.ranks.is_first:
            return Unwritten()
        progress, run = self.progress, self.run
        trackers = open_trackers(self.config.trackers, run, self.run_identity["train"], progress.step)  # may refuse
        self.accepted()
        return Metrics(run.metrics, progress.step, trackers, progress.metrics)

    def warm_up(self) -> None:
        """Compile in a step that changes nothing. If it needs more VRAM than planned, plan for less, once."""
        if self.session.execution is None:
            return
        self.transformer.train()
        leaner = None
        try:
            self.try_out(self.session)
        except torch.OutOfMemoryError:
            self.session.clear_gradients()
            leaner = None if self.saved_plan() else plan_for_less(self.session, self.config)
            if leaner is None:
                raise
        # All processes have one plan, which decides the last bits: whoever had room plans for less with the rest.
        if any(self.ranks.gather(leaner is not None)) and leaner is None:
            leaner = plan_for_less(self.session, self.config)
        if leaner is not None and leaner.execution is not None:  # not in the handler: the error keeps the step's memory
            self.session = leaner
            torch.cuda.empty_cache()
            self.try_out(leaner)

    def try_out(self, session: Session) -> None:
        """Do a pass that changes nothing, so that it is compiled; of every size, if passes are to be captured."""
        assert session.execution is not None
        groups = self.loader.batch(0).groups
        if session.graphs is None:
            session.execution.warm_up(partial(self.pass_once, session, groups[0].to(self.device)))
            return
        session.execution.warm_up(partial(session.graphs.try_out, groups))
        for micro in self.loader.first_of_each_size(MOST_KINDS):
            session.graphs.try_out(self.loader.batch(micro).groups)

    def pass_once(self, session: Session, group: Group) -> None:
        """The passes over a group, whose gradients are forgotten."""
        torch.autograd.backward(train_step(self.predict, group))
        if self.preserve and group.class_embeds is not None:
            noisy = flow.add_noise(group.latents, group.noise, group.sigma)
            torch.autograd.backward(preservation_loss(self.predict, self.predict_base, group, noisy))
        session.clear_gradients()

    def predict_base(self, *inputs: Any, **extra: Any) -> Tensor:
        """What the transformer predicts without its adapter."""
        with without_adapter(self.layers):
            return self.predict(*inputs, **extra)

    def steps(self, bars: Bars, metrics: Metrics) -> str:
        """Do what is due at this step, then take the next one, until there is a reason to end; return that."""
        config, progress = self.config, self.progress
        task = bars.add_task(f"training {self.run.name}", total=config.steps, completed=progress.step,
                             unit="step", note="")  # fmt: skip
        per_update, ranks = self.loader.per_update, self.ranks
        batches = prefetch(self.loader.batch, progress.step * per_update + ranks.rank, config.steps * per_update,
                           pin=self.device.type == "cuda", every=ranks.size)  # fmt: skip
        try:
            while True:
                reason = self.reason_to_end()
                self.validate(bars, metrics, is_last=bool(reason))
                reason = reason or self.reason_to_end()
                # Before the first step there is nothing to save, and no LoRA to draw with.
                asked = self.draw_what_is_asked(bars, metrics) if progress.step else set()
                if reason or "save" in asked:
                    self.save_state(metrics)  # first: where there is a LoRA and no state, somebody removed the state
                    self.save_checkpoint()
                elif progress.step and _is_multiple(progress.step, config.checkpoint_every):
                    self.save_beside(metrics)
                self.beside.check()
                for request in sorted(asked):
                    console.note(f"Did what was asked for at step {progress.step}: {request}")
                if reason:
                    self.save_finished()
                    return reason
                with interrupt.deferred() if ranks.size > 1 else nullcontext():  # all stop after the same step
                    self.losses.append(self.step(batches, metrics))
                if ranks.is_stopping:
                    raise KeyboardInterrupt
                bars.update(task, advance=1, note=f"loss {tail_mean(self.losses):.4f}")
        finally:
            batches.close()

    def step(self, batches: Iterator[Batch], metrics: Metrics) -> float:
        """Update the adapter once; return the loss."""
        config, progress, optimizer = self.config, self.progress, self.session.optimizer
        began = time.monotonic()
        if not self.transformer.training:  # train() visits 6,000 modules, which takes tens of milliseconds
            self.transformer.train()
        rate = learning_rate(progress.step, config.optim, config.steps)
        set_rate(optimizer, rate)
        self.session.begin()
        asked = time.monotonic()
        step_batches = list(islice(batches, config.gradient_accumulation_steps))
        waited = time.monotonic() - asked
        first = progress.step * self.loader.per_update + self.ranks.rank
        losses = accumulate(self.predict, step_batches, self.data, self.device, config.loss_limit, self.loss_of,
                            self.preserve, self.session.graphs,
                            partial(self.session.clip, config.optim.max_grad_norm), self.ranks,
                            partial(seed_dropout, config.seed, first, self.ranks.size) if config.lora.dropout else None,
                            )  # fmt: skip
        assert losses.norm is not None
        cost = cost_of_rollouts(self.cost, config, self.ranks)
        with interrupt.deferred():
            self.is_between_updates = False
            self.session.update(losses.rows, self.data, losses.norm)
            progress.step += 1
            self.is_between_updates = True
            seconds = time.monotonic() - began
            metrics.write(step=progress.step, loss=losses.mean,
                          **({} if losses.preservation is None else {"preservation_loss": losses.preservation}),
                          loss_by_sigma=by_sigma(losses.errors, config.validation.held_out_sigmas),
                          grad_norm=losses.norm, lr=rate, **prodigy_of(optimizer), **rows_of(losses.rows, seconds),
                          seconds=seconds, loader_seconds=waited,
                          **cost, **memory_of(self.device, self.session.base.plan.peak),
                          **steps_of(config))  # fmt: skip
        return losses.mean

    def validate(self, bars: Bars, metrics: Metrics, is_last: bool) -> None:
        """Draw pictures and measure the held-out loss if they are due."""
        self.validation.run_due(self.session, self.predict, self.progress, is_last, metrics, bars, self.save_best)

    def draw_what_is_asked(self, bars: Bars, metrics: Metrics) -> set[requests.Request]:
        """Draw if somebody asked for it meanwhile. The next step is the same with it.

        Returns:
            what was asked for and can be done. A save that is asked for is noted before the state is written.
        """
        progress, ranks = self.progress, self.ranks
        asked = set(ranks.agree(list(requests.take(self.run) if ranks.is_first else ())))
        if "sample" in asked and not self.validation.draw(self.session, progress, metrics, bars):
            console.warn("Asked for pictures, and the recipe has no validation prompts or pairs to draw")
            asked -= {"sample"}
        if "save" in asked:
            progress.asked = sorted({*progress.asked, progress.step})
        return asked

    def reason_to_end(self) -> str | None:
        """Why no step follows this one; None if one does. The first process's clock decides."""
        return self.ranks.agree(self._reason_to_end())

    def _reason_to_end(self) -> str | None:
        config, progress = self.config, self.progress
        if progress.step >= config.steps:
            return "steps"
        if config.max_hours and self.clock.seconds() >= 3600 * config.max_hours:
            return "max_hours"
        if config.validation.patience and progress.not_better >= config.validation.patience:
            return "patience"
        return None

    def save_lora(self, path: Path) -> None:
        """Write the adapter as a LoRA for use. Of several processes the first one does."""
        if self.ranks.is_first:
            self.beside.wait()
            self.copy_lora(path)()

    def copy_lora(self, path: Path) -> Callable[[], object]:
        """Copy the adapter to host memory; the function that is returned writes it."""
        self.run.check_there()
        facts = metadata(self.data, self.config, self.run_identity, self.run, self.progress.step)
        with self.session.settled():
            tensors = files.lora_state_dict(self.transformer)

        def write() -> None:
            with recorded(self.run.root, path) as record:
                files.write_lora(path, tensors, facts, record)

        return write

    def save_best(self) -> None:
        """Write the LoRA with the lowest held-out loss so far. Its name takes a look at the run's files."""
        self.save_lora(self.run.best)

    def save_finished(self) -> None:
        """Write the finished LoRA, and its average if the recipe has one."""
        self.save_lora(self.run.lora)
        if self.session.ema:
            with self.session.ema.swapped():
                self.save_lora(self.run.ema)

    def save_beside(self, metrics: Metrics) -> None:
        """Save the state and the LoRA of this step, where that can be done beside the steps that follow."""
        if not self.beside.has_room(MOST_COPIES * sum(p.nbytes for p in self.session.parameters.values())):
            self.save_state(metrics)
            self.save_checkpoint()
        elif self.ranks.is_first:  # each looks whether the run is there: it may be moved while steps go on
            writes = self.run.check_there, self.copy_state(metrics), self.run.check_there, self.copy_checkpoint()
            self.beside.begin(lambda: [write() for write in writes])

    def save_checkpoint(self) -> Path | None:
        """Write the LoRA under its step's name and remove the oldest ones beyond the limit, but those asked for."""
        if not self.progress.step or not self.ranks.is_first:
            return None
        self.beside.wait()
        self.copy_checkpoint()()
        return self.run.checkpoint(self.progress.step)

    def copy_checkpoint(self) -> Callable[[], object]:
        """Copy the adapter to host memory; the function that is returned does what ``save_checkpoint`` does."""
        write_lora = self.copy_lora(self.run.checkpoint(self.progress.step))
        limit, asked = self.config.checkpoints_total_limit, set(self.progress.asked)

        def write() -> None:
            write_lora()
            own = [path for step, path in self.run.checkpoints().items() if step not in asked]
            for old in own[: -limit if limit else 0]:
                old.unlink()

        return write

    def save_state(self, metrics: Metrics) -> None:
        """Write all that is needed to resume from this step. Of several processes the first one does."""
        if self.ranks.is_first:
            self.beside.wait()
            self.copy_state(metrics)()

    def copy_state(self, metrics: Metrics) -> Callable[[], object]:
        """Copy all that is needed to resume from this step to host memory; the function that is returned writes it."""
        self.run.check_there()
        self.progress.seconds = self.clock.seconds()
        self.progress.metrics = metrics.written()
        parts, plain = self.session.parts()
        plan = plan_facts(self.session.base.plan, self.config.deterministic)
        facts = {**plain, **plan, **self.facts, "identity": self.run_identity}
        return partial(save_state, self.run.state, deepcopy(self.progress), parts, facts)

    def save_stopped(self, metrics: Metrics | None) -> str:
        """Write the state to resume from, and say so. A signal that comes meanwhile waits; one more does not.

        A second signal may have cut an update short. What it left is neither of its step nor of the next: then the
        state of before stays the newest. Another process than the first saves nothing, and says nothing of it.
        """
        if not self.ranks.is_first:
            return ""
        if metrics is None:
            self.run.keep()
            return f" before step {self.progress.step + 1}"
        if not self.is_between_updates:
            return f" in the middle of step {self.progress.step + 1}, which is not saved"
        is_saved = any(self.run.state.glob("step-*"))
        saved = ", and the last step that was saved stays" if is_saved else ", before any step was saved"
        with suppress(KeyboardInterrupt), interrupt.deferred():
            self.beside.finish()
            self.save_state(metrics)
            saved = f" and saved at step {self.progress.step}"
        return saved

    def save_after_error(self, metrics: Metrics | None) -> Path | None:
        """Write the LoRA and, unless an update was cut short, the state to resume from; return the LoRA's path."""
        if metrics is None:
            self.save_stopped(metrics)
            return None
        self.session.optimizer.zero_grad(set_to_none=True)
        if self.is_between_updates and self.progress.step:
            self.save_state(metrics)
        return self.save_checkpoint()

    def saved_plan(self) -> SavedPlan | None:
        """The plan that the run must go on with, according to the state that it goes on from or has saved since."""
        saved = latest_state(self.run.state) if self.metrics else self.saved
        return read_saved_plan(saved, self.config.deterministic)


def _is_multiple(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
