"""The training loop: batches in, updates to the adapter, checkpoints and pictures out. Stopped anywhere, it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress as Bars

from k5cache.shared import console
from k5cache.shared.checkpoint import read_config
from k5cache.shared.files import write_json
from k5train.adapter import files
from k5train.adapter.who_loads import call_for, compare_saved
from k5train.base.quantize import empty_transformer
from k5train.data.compatible import check_fit
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture
from k5train.data.prefetch import prefetch
from k5train.forward.predict_velocity import predict_velocity
from k5train.objective.rollout import Cost
from k5train.objective.tread import check_routes
from k5train.options.train import TrainConfig
from k5train.pictures.sample import inference_sigmas
from k5train.planning.plan import largest_sizes
from k5train.planning.saved_plan import SavedPlan, plan_facts, read_saved_plan
from k5train.runs.folder import Run, hold
from k5train.runs.metrics import Metrics, read_metrics
from k5train.runs.resume_state import Progress, latest_state, save_state
from k5train.runs.trackers import check_trackers, open_trackers
from k5train.training.base import Base, follow, load_base
from k5train.training.device import determinism, pick_device
from k5train.training.held_out_loss import hold_out
from k5train.training.identity import check_same, identity
from k5train.training.interrupt import Interruptions
from k5train.training.metadata import metadata
from k5train.training.optimizer import learning_rate
from k5train.training.out_of_memory import when_memory_ends
from k5train.training.session import Clock, Session, attach, leaner
from k5train.training.step import accumulate, train_step
from k5train.training.validation import Validation

LOG_LINES = 20  # of a run whose progress bar nobody sees


@dataclass(frozen=True)
class Result:
    """What a finished run leaves behind."""

    lora: Path
    loads_by: str
    """How diffusers loads it: it was loaded so after saving, and compared."""
    grid: Path | None
    steps: int
    first_loss: float
    last_loss: float
    """Mean of the first and of the last tenth of the steps: single losses jump with sigma."""
    seconds: float
    ended_by: str
    """``steps``, ``max_hours`` or ``patience``."""
    best_step: int | None
    best_loss: float | None
    """The lowest held-out loss, and when; its LoRA is ``<name>-best.safetensors``."""
    seconds_to_start: float
    """From the call of ``train`` until everything was ready for the first step."""


def train(
    data: Mixture, folder: Path, config: TrainConfig, run: Run, base: Base | None = None,
    accepted: Callable[[], object] | None = None,
) -> Result:  # fmt: skip
    """Train one LoRA, from where ``run`` was left.

    Args:
        folder: the checkpoint; of it only ``transformer``, and ``scheduler`` and ``vae`` for samples, are read.
        base: the loaded transformer, where several runs share one; it is handed back as it was.
        accepted: called once nothing more can be refused, before the first step.

    Raises:
        CacheStale: the cache does not fit the transformer.
        DoesNotFit: no plan fits, found before anything is loaded; or memory ended all the same: the LoRA is saved.
        RunError: there is no GPU for a full-size model, the loss is not finite, or the run was started differently.
        KeyboardInterrupt: Ctrl-C; the state is saved.
    """
    called = time.monotonic()
    device = base.device if base else pick_device(config.device, folder)
    check_fit(data.first, folder)
    check_trackers(config.trackers)
    data = hold_out(data, config.validation.split)
    with hold(run), ExitStack() as settings:
        saved, this = latest_state(run.state), identity(data, folder, config)
        if saved:
            check_same(saved, this)
        kept = read_saved_plan(saved, config.deterministic)
        if saved and config.deterministic and not kept:
            console.warn("The run was saved without its memory plan: exact only if the new one happens to be the same")
        base = base and follow(base, kept)
        decided = base.plan if base else kept.plan if kept else None
        sizes = (decided and decided.sizes) or largest_sizes(*(source.cache for source in data.sources))
        settings.enter_context(determinism(config.deterministic, (sizes, config.lora)))
        validation = Validation(data, folder, config, run)
        loader, config = open_loader(data, folder, config)
        base = base or load_base(data, folder, config, device, kept=kept)
        session = attach(base, config, saved)
        # What is refused until here leaves a finished run as it was. From here on the run is what is asked for now.
        run.result.unlink(missing_ok=True)
        if accepted:
            accepted()
        progress = replace(saved.progress) if saved else Progress()
        if saved:
            console.note(f"Going on from step {progress.step}")
        try:
            loop = _Loop(data, config, run, session, loader, validation, progress, this)
            ended_by = loop.run_to_end()
            result = _result(run, progress, config, ended_by, loop.ready - called)
            names = {"lora": result.lora.name, "grid": result.grid.name if result.grid else None}
            write_json(run.result, {**asdict(result), **names})
            with session.settled():
                compare_saved(run.lora, base.transformer, empty_transformer(folder), call_for(config.lora.algo))
        finally:
            session.close()
    return result


class _Loop:
    """One run while it runs."""

    def __init__(
        self, data: Mixture, config: TrainConfig, run: Run, session: Session, loader: Loader, validation: Validation,
        progress: Progress, identity: dict[str, Any],
    ) -> None:  # fmt: skip
        self.data, self.config, self.run, self.session = data, config, run, session
        self.loader, self.validation, self.progress, self.identity = loader, validation, progress, identity
        self.transformer, self.device = session.base.transformer, session.base.device
        self.predict = partial(predict_velocity, self.transformer)
        self.cost = Cost()
        huber_c = config.objective.huber_c if config.objective.loss_type == "huber" else None
        self.loss_of = partial(train_step, huber_c=huber_c, cost=self.cost)
        self.clock = Clock(progress.seconds)
        self.losses: list[float] = []
        self.is_between_updates = True
        """The adapter and the optimizer are those of ``progress.step``."""
        self.ready = time.monotonic()

    def run_to_end(self) -> str:
        """Train until there is a reason to end, and return it."""
        progress, run, interruptions = self.progress, self.run, Interruptions()
        trackers = open_trackers(self.config.trackers, run, self.identity["train"], progress.step)
        with (
            interruptions.installed(),
            console.progress() as bars,
            Metrics(run.metrics, progress.step, trackers) as metrics,
            when_memory_ends(
                lambda: self.session.base.plan,
                partial(self.save_all, metrics),
                partial(console.command, "k5train", "resume", run.root),
                self.kept,
            ),  # fmt: skip
        ):
            try:
                self.warm_up()
                self.ready = time.monotonic()
                return self.steps(bars, metrics, interruptions)
            except KeyboardInterrupt:
                with interruptions.held():
                    self.save_state(metrics)
                console.note(
                    f"Stopped and saved at step {progress.step}. Go on with: k5train resume {run.root}", "bold"
                )
                raise

    def steps(self, bars: Bars, metrics: Metrics, interruptions: Interruptions) -> str:
        """Until a reason to end: what is due at this step, then the next one."""
        config, progress = self.config, self.progress
        task = bars.add_task(f"training {self.run.name}", total=config.steps, completed=progress.step,
                             unit="step", note="")  # fmt: skip
        per_update = config.gradient_accumulation_steps
        batches = prefetch(self.loader.batch, progress.step * per_update, config.steps * per_update,
                           pin=self.device.type == "cuda")  # fmt: skip
        try:
            while True:
                ends = self.reason_to_end()
                self.validate(bars, metrics, is_last=bool(ends))
                ends = ends or self.reason_to_end()
                if ends or (progress.step and _is_multiple(progress.step, config.checkpoint_every)):
                    self.save_checkpoint()
                    self.save_state(metrics)
                if ends:
                    self.save_lora(self.run.lora)
                    if self.session.ema:
                        with self.session.ema.swapped():
                            self.save_lora(self.run.ema)
                    return ends
                loss = self.step(batches, metrics, interruptions)
                self.losses.append(loss)
                bars.update(task, advance=1, note=f"loss {_tail_mean(self.losses):.4f}")
                if not console.err.is_terminal and _is_multiple(progress.step, max(1, config.steps // LOG_LINES)):
                    console.note(f"step {progress.step}/{config.steps}, loss {_tail_mean(self.losses):.4f}")
        finally:
            batches.close()

    def step(self, batches: Any, metrics: Metrics, interruptions: Interruptions) -> float:
        """One update of the adapter."""
        config, progress, optimizer = self.config, self.progress, self.session.optimizer
        tick = time.monotonic()
        if not self.transformer.training:  # walks 6,000 modules: tens of milliseconds
            self.transformer.train()
        rate = learning_rate(progress.step, config.optim, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if config.lora.dropout:
            torch.manual_seed(config.seed * 1_000_003 + progress.step)  # as every draw: of the seed and the step
        asked = time.monotonic()
        step_batches = list(islice(batches, config.gradient_accumulation_steps))
        waited = time.monotonic() - asked
        loss = accumulate(self.predict, step_batches, self.data, self.device, config.loss_limit, self.loss_of)
        with interruptions.held():
            self.is_between_updates = False
            norm = self.session.update(step_batches, self.data, config.optim.max_grad_norm)
            progress.step += 1
            self.is_between_updates = True
            metrics.write(step=progress.step, loss=loss, grad_norm=norm, lr=rate,
                          seconds=time.monotonic() - tick, loader_seconds=waited,
                          **self.cost.take(), **_memory(self.device))  # fmt: skip
        return loss

    def validate(self, bars: Bars, metrics: Metrics, is_last: bool) -> None:
        """Pictures and held-out loss, where due."""
        save_best = partial(self.save_lora, self.run.best)
        self.validation.run_due(self.session, self.predict, self.progress, is_last, metrics, bars, save_best)

    def reason_to_end(self) -> str | None:
        """Why this step is the last."""
        config, progress = self.config, self.progress
        if progress.step >= config.steps:
            return "steps"
        if config.max_hours and self.clock.seconds() >= 3600 * config.max_hours:
            return "max_hours"
        if config.validation.patience and progress.not_better >= config.validation.patience:
            return "patience"
        return None

    def warm_up(self) -> None:
        """Compile on a step that changes nothing. One that needs more VRAM than planned is planned again, once."""
        if self.session.execution is None:
            return
        group = self.loader.batch(0).groups[0].to(self.device)

        def step_once() -> None:
            torch.autograd.backward(train_step(self.predict, group))
            self.session.optimizer.zero_grad(set_to_none=True)

        self.transformer.train()
        again = None
        try:
            self.session.execution.warm_up(step_once)
        except torch.OutOfMemoryError:
            self.session.optimizer.zero_grad(set_to_none=True)
            again = None if self.kept() else leaner(self.session, self.config, self.data)
            if again is None:
                raise
        if again is not None and again.execution is not None:  # out of the handler: the error held the step's memory
            self.session = again
            torch.cuda.empty_cache()
            again.execution.warm_up(step_once)

    def save_lora(self, path: Path) -> None:
        """The adapter as it is, for use."""
        facts = metadata(self.data, self.config, self.identity, self.run, self.progress.step)
        with self.session.settled():
            files.save_lora(path, self.transformer, facts)

    def save_checkpoint(self) -> Path | None:
        """The adapter as it is under its step's name; the oldest beyond the limit go."""
        if not self.progress.step:
            return None
        path = self.run.checkpoint(self.progress.step)
        self.save_lora(path)
        limit = self.config.checkpoints_total_limit
        for old in list(self.run.checkpoints().values())[: -limit if limit else 0]:
            old.unlink()
        return path

    def save_all(self, metrics: Metrics) -> Path | None:
        """The adapter as it is and, unless an update broke off, what is needed to go on from it."""
        self.session.optimizer.zero_grad(set_to_none=True)
        if self.is_between_updates and self.progress.step:
            self.save_state(metrics)
        return self.save_checkpoint()

    def save_state(self, metrics: Metrics) -> None:
        """All that is needed to go on from this step."""
        self.progress.seconds = self.clock.seconds()
        metrics.sync()
        parts, plain = self.session.parts()
        facts = {**plain, **plan_facts(self.session.base.plan, self.config.deterministic), "identity": self.identity}
        save_state(self.run.state, self.progress, parts, facts)

    def kept(self) -> SavedPlan | None:
        """The plan that the run can only go on with, by the state on disk."""
        return read_saved_plan(latest_state(self.run.state), self.config.deterministic)


def open_loader(data: Mixture, folder: Path, config: TrainConfig) -> tuple[Loader, TrainConfig]:
    """The batches of a run, and its recipe with ``steps`` as many as ``epochs`` take, where it counts those.

    Raises:
        RecipeError: a TREAD route is not the transformer's, or masks are asked for and there are none.
    """
    check_routes(config.tread.routes, read_config(folder, "transformer")["num_visual_blocks"])
    scaling_factor = read_config(folder, "vae")["scaling_factor"]
    if config.epochs is not None:
        micro_batches = Loader(data, config, scaling_factor).micro_batches(config.epochs)
        config = replace(config, steps=-(-micro_batches // config.gradient_accumulation_steps))
    grid = inference_sigmas(folder, config.rollout.num_inference_steps) if config.rollout.probability else None
    return Loader(data, config, scaling_factor, grid), config


def _result(run: Run, progress: Progress, config: TrainConfig, ended_by: str, seconds_to_start: float) -> Result:
    losses = [row["loss"] for row in read_metrics(run.metrics) if "loss" in row]
    tenth = max(1, len(losses) // 10)
    return Result(
        lora=run.lora,
        loads_by=call_for(config.lora.algo),
        grid=run.grid if config.validation.prompts else None,
        steps=progress.step,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        seconds=progress.seconds,
        ended_by=ended_by,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        seconds_to_start=seconds_to_start,
    )


def _memory(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {"peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30}


def _is_multiple(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _tail_mean(losses: list[float], count: int = 20) -> float:
    return sum(losses[-count:]) / len(losses[-count:])
