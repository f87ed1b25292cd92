"""One run, from the checks before anything is loaded to the finished LoRA and its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from k5cache.shared import console, interrupt
from k5cache.shared.checkpoint import read_config
from k5cache.shared.disk_errors import named
from k5cache.shared.sealed import write_sealed
from k5cache.shared.template import PIPELINES
from k5train.adapter.attach import check_start
from k5train.adapter.who_loads import call_for, compare_saved
from k5train.base.quantize import empty_transformer
from k5train.data.compatible import check_fit
from k5train.data.kind import check_options
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture
from k5train.objective.tread import check_routes
from k5train.options.rate import with_usual_rate
from k5train.options.train import TrainConfig
from k5train.pictures.drawings import draws_any
from k5train.pictures.sample import inference_sigmas
from k5train.runs.folder import Run, lock_run, remove_leftovers
from k5train.runs.metrics import check_metrics, read_metrics
from k5train.runs.resume_state import Progress, latest_state, remove_after
from k5train.runs.trackers import check_trackers
from k5train.runs.written import check_recorded
from k5train.training.base import Base, load_base
from k5train.training.determinism import determinism
from k5train.training.device import pick_device
from k5train.training.held_out_loss import split_off
from k5train.training.identity import check_same, identity
from k5train.training.loop import Loop
from k5train.training.overwriting import check_overwrites
from k5train.training.session import attach
from k5train.training.validation import HELD_OUT, Validation
from k5train.training.which_plan import decide_plan


@dataclass(frozen=True)
class Result:
    """What a finished run leaves behind."""

    lora: Path
    loads_by: str
    """How diffusers loads it. The saved file was loaded that way and compared."""
    grid: Path | None
    steps: int
    first_loss: float
    last_loss: float
    """Mean over the first and over the last tenth of the steps, because the loss of one step jumps with its sigma."""
    seconds: float
    ended_by: str
    """``steps``, ``max_hours`` or ``patience``."""
    best_step: int | None
    best_loss: float | None
    """The lowest held-out loss and its step. The LoRA of that step is ``<name>-best.safetensors``."""
    seconds_to_start: float
    """From the call of ``train`` until everything was ready for the first step."""
    pipeline: str = PIPELINES["t2i"]
    """The class of diffusers that ``loads_by`` calls ``pipe``."""
    base_held_out_loss: float | None = None
    """Before the first step: of the base model, or of the LoRA in ``train.lora.init_lora``."""
    held_out_loss: float | None = None
    """After the last step. None where there is no split, or if it is not finite."""
    ema_held_out_loss: float | None = None
    """Of ``<name>-ema.safetensors``, after the last step."""
    base_probe_loss: float | None = None
    """As ``base_held_out_loss``, on images that are trained on."""
    probe_loss: float | None = None


def train(
    data: Mixture, folder: Path, config: TrainConfig, run: Run, base: Base | None = None,
    accepted: Callable[[], object] | None = None, step: int | None = None, always_probe: bool = False,
) -> Result:  # fmt: skip
    """Train one LoRA. A run with a saved state goes on from there.

    Args:
        folder: the checkpoint. Only ``transformer`` is read, and ``scheduler`` and ``vae`` for pictures.
        base: the loaded transformer that several runs share. It is returned to its state without an adapter.
        accepted: called before the first step, when nothing more can be refused.
        step: go on from the state of this step, and remove those after it. None: from the newest.
        always_probe: measure the loss on some images that are trained on, before the first step and after the last,
            also without a split. A run that measured it before the first step goes on to do so.

    Raises:
        CacheStale: the cache does not fit the transformer.
        RecipeError: an option belongs to the other kind of model.
        DoesNotFit: no plan fits, which is found before anything is loaded; or VRAM ran out all the same, and the LoRA
            is saved.
        RunError: there is no GPU for a full-size model, the loss is not finite, the run was started differently, its
            saved state is damaged or was removed, or a LoRA would be overwritten that the run did not make.
        KeyboardInterrupt: Ctrl-C. The state is saved.
    """
    called, config = time.monotonic(), with_usual_rate(config)
    device = base.device if base else pick_device(config.device, folder)
    check_fit(data.first, folder)
    check_options(data, config)
    check_trackers(config.trackers)
    data = split_off(data, config.validation.split)
    with lock_run(run):
        remove_leftovers(run)
        saved = latest_state(run.state, step)
        run_identity = identity(data, folder, config)
        if saved:
            check_same(saved, run_identity)
            saved.check()
            check_metrics(run.metrics, saved.progress.metrics)
        elif config.lora.init_lora:
            if (start := Path(config.lora.init_lora)).is_file():
                check_recorded(start)
            check_start(empty_transformer(folder), config.lora)
        check_overwrites(run, saved, data, config, run_identity)
        is_probed = always_probe or (saved is not None and HELD_OUT in saved.progress.validated)
        validation = Validation(data, folder, config, run, is_probed)
        loader, config = open_loader(data, folder, config)
        plan = decide_plan(data, folder, config, device, saved, base.plan if base else None)
        with determinism(config.deterministic, (plan.sizes, config.lora)):
            base = replace(base, plan=plan) if base else load_base(folder, config, device, plan)
            with closing(attach(base, config, saved)) as session:
                # Whatever is refused before this line leaves a finished run as it is.
                run.result.unlink(missing_ok=True)
                if accepted:
                    accepted()
                progress = replace(saved.progress) if saved else Progress()
                if saved:
                    remove_after(run.state, progress.step)
                    console.note(f"Going on from step {progress.step}")
                loop = Loop(data, config, run, session, loader, validation, progress, run_identity)
                with named(run.root):
                    ended_by = loop.run_to_end()
                    check = console.command("k5train", "check-lora", run.lora, model=folder)
                    with interrupt.saying(f"Stopped after the last step. To see what loads the LoRA: {check}"):
                        with interrupt.deferred():
                            result = _result(data, run, progress, config, ended_by, loop.ready - called)
                            names = {"lora": result.lora.name, "grid": result.grid.name if result.grid else None}
                            write_sealed(run.result, {**asdict(result), **names})
                        with session.settled():
                            empty, call = empty_transformer(folder), call_for(config.lora.algo)
                            compare_saved(run.lora, base.transformer, empty, call)
    return result


def open_loader(data: Mixture, folder: Path, config: TrainConfig) -> tuple[Loader, TrainConfig]:
    """The batches of a run, and its recipe with ``epochs`` translated to ``steps``.

    Raises:
        RecipeError: a TREAD route does not fit the transformer, or the recipe uses masks and the cache has none.
    """
    check_routes(config.tread.routes, read_config(folder, "transformer")["num_visual_blocks"])
    scaling_factor = read_config(folder, "vae")["scaling_factor"]
    if config.epochs is not None:
        micro_batches = Loader(data, config, scaling_factor).micro_batches(config.epochs)
        config = replace(config, steps=-(-micro_batches // config.gradient_accumulation_steps))
    grid = inference_sigmas(folder, config.rollout.num_inference_steps) if config.rollout.probability else None
    return Loader(data, config, scaling_factor, grid), config


def _result(
    data: Mixture, run: Run, progress: Progress, config: TrainConfig, ended_by: str, seconds_to_start: float
) -> Result:
    rows = read_metrics(run.metrics)
    losses = [row["loss"] for row in rows if "loss" in row]
    first, last = _measured_at(0, rows), _measured_at(progress.step, rows)
    tenth = max(1, len(losses) // 10)
    return Result(
        lora=run.lora,
        loads_by=call_for(config.lora.algo),
        grid=run.grid if draws_any(data.first, config.validation) else None,
        steps=progress.step,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        seconds=progress.seconds,
        ended_by=ended_by,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        seconds_to_start=seconds_to_start,
        pipeline=PIPELINES[data.first.kind],
        base_held_out_loss=first.get("held_out_loss"),
        held_out_loss=last.get("held_out_loss"),
        ema_held_out_loss=last.get("ema_held_out_loss"),
        base_probe_loss=first.get("probe_loss"),
        probe_loss=last.get("probe_loss"),
    )


def _measured_at(step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line of the last measurement at a step; nothing if none was made there."""
    measured = [row for row in rows if row["step"] == step and ("held_out_loss" in row or "probe_loss" in row)]
    return measured[-1] if measured else {}
