"""How many images a second does a LoRA train on, on several GPUs of one host beside one? Full size, random weights.

python -m pipelines.measure.gpus --gpus 1 --gpus 2 -o gpus.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from k5train.parallel.launch import launch
from k5train.parallel.ranks import ALONE, Ranks
from k5train.parallel.together import joined
from k5train.parallel.world import world_of
from pipelines.measure import command_line

ACCUMULATION = 4
_SOURCE: Any = None  # the rows of random numbers have no names


def main(
    gpus: Annotated[list[int], typer.Option(help="How many GPUs. May be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the numbers, as JSON.")],
    side: Annotated[int, typer.Option(help="Of the pictures, in pixels.")] = 1024,
    updates: Annotated[int, typer.Option(help="That are timed.")] = 12,
    precision: Annotated[str, typer.Option(help="Of the base model.")] = "int8-quanto",
) -> None:
    """Time updates of 4 micro-batches of one picture on each number of GPUs, one after the other."""
    results = []
    for count in gpus:
        path = out.with_name(f"{out.stem}-{count}.json")
        path.unlink(missing_ok=True)
        words = [str(path), str(side), str(updates), precision]
        code = launch([sys.executable, "-m", "pipelines.measure.gpus", "worker", *words], count)
        if code or not path.is_file():
            raise typer.Exit(code or 1)
        results.append(json.loads(path.read_text(encoding="utf-8")))
    first = results[0]["images_per_second"]
    rows = [
        [str(r["gpus"]), f"{r['images_per_second']:.3f}", f"{r['images_per_second'] / first:.2f}x",
         f"{1000 * r['seconds']:.0f}", f"{1000 * r['waiting']:.1f}", f"{r['reserved_gib']:.1f}"]
        for r in results
    ]  # fmt: skip
    columns = ("GPUs", "images/s", "beside the first", "ms an update", "ms of it adding up", "GiB reserved")
    setting = f"{side}x{side}, batch 1, accumulation {ACCUMULATION}, {precision}"
    command_line.print_table(setting, columns, rows, columns)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def worker(out: Path, side: int, updates: int, precision: str) -> None:
    """Be one of the processes, and if it is the first write what was measured."""
    world = world_of()
    ranks_of: AbstractContextManager[Ranks] = joined(world, "auto") if world else nullcontext(ALONE)
    with ranks_of as ranks:
        measured = measure(ranks, side, updates, precision)
        ranks.gather("done")
        if ranks.is_first:
            out.write_text(json.dumps(measured), encoding="utf-8")


def measure(
    ranks: Ranks, side: int, updates: int, precision: Any, model: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The median seconds of an update, and what follows from it.

    Args:
        model: a transformer's config. None: the published one.
    """
    import torch

    from k5train.adapter.attach import add_lora
    from k5train.base.architecture import FULL_SIZE
    from k5train.base.random_weights import random_transformer
    from k5train.bench.case import Case, inputs_for
    from k5train.bench.one_step import group_of
    from k5train.data.batch import Batch
    from k5train.forward.load import stream_weights, streamed_blocks
    from k5train.forward.predict_velocity import predict_velocity
    from k5train.options.adapter import LoraConfig
    from k5train.options.rate import with_usual_rate
    from k5train.options.train import TrainConfig
    from k5train.planning import vram
    from k5train.planning.plan import plan_for
    from k5train.training.base import Base
    from k5train.training.session import session_of
    from k5train.training.step import accumulate, loss_function

    model = model or FULL_SIZE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks.connect(device, False)
    config = with_usual_rate(TrainConfig(
        base_model_precision=precision, mixed_precision="bf16" if device.type == "cuda" else "fp32",
        gradient_accumulation_steps=ACCUMULATION, lora=LoraConfig(rank=32, alpha=32, targets=("official",)),
    ))  # fmt: skip
    case = Case(precision, None, side, rank=32)
    plan = plan_for(model, config, device, ((side // 16) ** 2, case.num_text_tokens), vram.budget(device, None))
    transformer = random_transformer(model, precision, device, frozenset(streamed_blocks(plan)))
    stream_weights(transformer, plan, device)
    add_lora(transformer, config.lora, seed=0)
    session = session_of(Base(transformer, device, plan), config, ranks)
    group = group_of(inputs_for(case, model, device))
    rows = group.latents.shape[0]
    batches = [Batch((0,) * rows, (group,), rows * ACCUMULATION * ranks.size)] * ACCUMULATION
    transformer.train()
    predict, waits = partial(predict_velocity, transformer), []

    def clip() -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize()  # so that what follows is the sum alone
        began = time.monotonic()
        norm = session.clip(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        waits.append(time.monotonic() - began)
        return norm

    seconds = []
    for _ in range(updates + 4):  # the first compile, and capture
        began = time.monotonic()
        session.begin()
        losses = accumulate(predict, batches, _SOURCE, device, 0.0, loss_function(config), None, session.graphs, clip,
                            ranks)  # fmt: skip
        assert losses.norm is not None
        session.update(losses.rows, _SOURCE, losses.norm)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    update = statistics.median(seconds[4:])
    reserved = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    is_captured = session.graphs is not None and not session.graphs.is_off
    return {
        "gpus": ranks.size, "images_per_second": rows * ACCUMULATION * ranks.size / update, "seconds": update,
        "waiting": statistics.median(waits[4:]), "reserved_gib": reserved, "captured": is_captured,
        "losses": losses.mean,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        path, side, updates, precision = sys.argv[2:]
        worker(Path(path), int(side), int(updates), precision)
    else:
        command_line.run(main)
