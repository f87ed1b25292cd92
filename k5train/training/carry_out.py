"""A run that passed its checks: load the base, attach the adapter, train, and compare the LoRA that was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
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
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture
from k5train.objective.tread import check_routes
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks
from k5train.pictures.drawings import draws_any
from k5train.pictures.sample import inference_sigmas
from k5train.planning.plan import how_to_run
from k5train.runs.folder import Run
from k5train.runs.metrics import read_metrics
from k5train.runs.resume_state import Progress, SavedState, remove_after
from k5train.training.base import Base, load_base
from k5train.training.determinism import determinism
from k5train.training.device import pick_device
from k5train.training.loop import Loop
from k5train.training.result import Result
from k5train.training.session import attach
from k5train.training.shared_out import check_room, facts_of
from k5train.training.validation import HELD_OUT, Validation
from k5train.training.which_plan import decide_plan


def carry_out(
    data: Mixture, folder: Path, config: TrainConfig, run: Run, run_identity: dict[str, Any], saved: SavedState | None,
    called: float, base: Base | None, accepted: Callable[[], object] | None, always_probe: bool,
    ranks: Ranks = ALONE,
) -> Result | None:  # fmt: skip
    """Train one LoRA, of which ``train`` has checked what needs no torch. Arguments and errors are those of ``train``.

    Returns:
        None on another process than the first of several.

    Args:
        data: without what the run holds out.
        saved: where the run goes on. None: it begins.
        called: when ``train`` was called, in seconds of the monotonic clock.
    """
    device = base.device if base else pick_device(config.device, folder)
    ranks.connect(device, config.deterministic)
    if config.lora.init_lora and not saved:
        check_start(empty_transformer(folder), config.lora)
    is_probed = always_probe or (saved is not None and HELD_OUT in saved.progress.validated)
    validation = Validation(data, folder, config, run, is_probed, ranks)
    loader, config = open_loader(data, folder, config, ranks.size)
    plan = decide_plan(data, folder, config, device, saved, base.plan if base else None, ranks)
    if ranks.size > 1:
        check_room(ranks, plan.host_bytes)
    is_compiled = device.type == "cuda" and how_to_run(config, device) == "compiled"
    with determinism(config.deterministic, (plan.sizes, config.lora), is_compiled=is_compiled):
        base = replace(base, plan=plan) if base else load_base(folder, config, device, plan)
        with closing(attach(base, config, saved, ranks)) as session:
            ranks.gather("ready")  # all have read the state, which the first one may now remove
            progress = replace(saved.progress) if saved else Progress()

            def begin() -> None:
                """Change the run: whatever is refused before leaves a finished one as it is."""
                run.result.unlink(missing_ok=True)
                if accepted:
                    accepted()
                if saved:
                    remove_after(run.state, progress.step)
                    console.note(f"Going on from step {progress.step}")

            loop = Loop(data, config, run, session, loader, validation, progress, run_identity, saved, ranks,
                        facts_of(ranks, saved), begin)  # fmt: skip
            with named(run.root):
                ended_by = loop.run_to_end()
                if not ranks.is_first:
                    return None
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


def open_loader(data: Mixture, folder: Path, config: TrainConfig, num_ranks: int = 1) -> tuple[Loader, TrainConfig]:
    """The batches of a run, and its recipe with ``epochs`` translated to ``steps``.

    Args:
        num_ranks: processes that train together.

    Raises:
        RecipeError: a TREAD route does not fit the transformer, or the recipe uses masks and the cache has none.
    """
    check_routes(config.tread.routes, read_config(folder, "transformer")["num_visual_blocks"])
    scaling_factor = read_config(folder, "vae")["scaling_factor"]
    if config.epochs is not None:
        micro_batches = Loader(data, config, scaling_factor).micro_batches(config.epochs)
        config = replace(config, steps=-(-micro_batches // (config.gradient_accumulation_steps * num_ranks)))
    grid = inference_sigmas(folder, config.rollout.num_inference_steps) if config.rollout.probability else None
    return Loader(data, config, scaling_factor, grid, num_ranks), config


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
