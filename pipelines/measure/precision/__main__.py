"""The command: ``python -m pipelines.measure.precision``. Trains the runs, judges them, prints a verdict."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from k5cache.shared import console
from k5cache.shared.files import make_folder, write_json, write_whole
from k5cache.shared.outputs import check_file
from k5train.pictures.sheet import grid
from pipelines.measure import command_line, pool
from pipelines.measure.precision import trial
from pipelines.measure.precision.verdict import JUDGED_ON, REFERENCE
from pipelines.measure.settings.concepts import CONCEPTS
from pipelines.measure.settings.grid import STEPS
from pipelines.measure.settings.tables import LABELS, markdown
from pipelines.measure.settings.trial import PROMPTS, machine

_COLOURS = 96  # of the palette: the sheet stands in the docs


def main(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Write all results here, as JSON, and a sheet of pictures beside it.")
    ] = Path("build/precision/precision.json"),
    seeds: Annotated[int, typer.Option(min=2, help="Runs on each precision and concept.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with one thread each.")] = os.cpu_count() or 1,
    minutes: Annotated[float, typer.Option(help="Stop after this time; the same command goes on.")] = 60,
    device: Annotated[str, typer.Option(help="Where to train, judge and draw.")] = "cuda",
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = STEPS,
    concept: Annotated[list[str] | None, typer.Option(help="Only this concept; may be given again.")] = None,
    folder: Annotated[Path, typer.Option(help="Where caches and runs are kept.")] = Path("build/precision"),
) -> None:
    """Train LoRAs of k5-micro on each precision, and say whether they differ by more than two seeds do."""
    until = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    names = tuple(concept or CONCEPTS)
    setting = {"steps": steps, "device": device}
    pool.read_results(check_file(out, ".json"), setting)  # refuses another file before any work
    make_folder(out.parent)
    place = trial.prepare(folder, names)
    do = partial(pool.do_all, trial.do, file=out, setting=setting, report=console.note, until=until)
    # The first runs also fill the caches of compiled code, which all later processes read.
    first: dict[str, tuple[Any, ...]] = {
        f"kernels/{arm}": (trial.count_kernels, place, arm, device) for arm in trial.ARMS
    }
    first |= {f"base/{name}": (trial.of_base, place, name, device) for name in names}
    do(first, workers=min(workers, len(first)))
    jobs = {trial.name_of(*j): (trial.train_and_judge, place, *j, device, steps) for j in trial.jobs(seeds, names)}
    done = do(jobs, workers=workers)
    results = pool.read_results(out, setting)["results"]
    console.note(f"{len(done)} of {len(jobs)} runs are done")
    write_json(out, {"setting": setting, "results": results, "machine": machine_and_gpu()})
    picture = sheet(results, names)
    write_whole(out.with_suffix(".png"), lambda path: picture.save(path, format="PNG", optimize=True))
    typer.echo(table(results, names))
    typer.echo(kernels(results))
    try:
        typer.echo(trial.verdict(results))
    except ValueError as error:  # stopped by --minutes
        typer.echo(f"No verdict yet: {error}")


def machine_and_gpu() -> dict[str, Any]:
    """What the trial was made on."""
    return machine() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def table(results: dict[str, Any], names: tuple[str, ...]) -> str:
    """The mean share of each precision and concept, and behind it the standard deviation over its seeds."""
    rows = []
    for arm in trial.ARMS:
        row = [f"`{arm}`"]
        for name in names:
            for measure in JUDGED_ON:
                values = list(trial.shares(results, arm, measure).get(name, {}).values())
                text = f"{mean(values):.4f}" if values else ""
                row.append(f"{text} ± {stdev(values):.4f}" if len(values) > 1 else text)
        rows.append(row)
    heads = [f"{LABELS[name]}: {what}" for name in names for what in JUDGED_ON.values()]
    return markdown(("trained on", *heads), rows)


def kernels(results: dict[str, Any]) -> str:
    """How often each kernel runs in a step."""
    rows = []
    for arm in trial.ARMS:
        counts = results.get(f"kernels/{arm}", {"problem": "not counted"})
        cells = [counts["problem"]] if "problem" in counts else [f"{counts.get(name, 0):.1f}" for name in trial.COUNTED]
        rows.append([f"`{arm}`", *cells])
    return markdown(("kernels of a step", *(f"`{name}`" for name in trial.COUNTED)), rows)


def sheet(results: dict[str, Any], names: tuple[str, ...]) -> Image.Image:
    """What the base and the first seed of each precision draw, and another seed of the reference."""
    rows = {"base": "base", **{f"{arm}, seed 0": f"{arm}/0" for arm in trial.ARMS}}
    rows[f"{REFERENCE}, seed 1"] = f"{REFERENCE}/1"
    drawn = []
    for label, key in rows.items():
        arm, _, seed = key.partition("/")
        keys = [f"{arm}/{name}/{seed}".rstrip("/") for name in names]
        if all(key in results for key in keys):
            drawn.append((label, [picture for key in keys for picture in trial.pictures_of(results[key])]))
    picture = grid(drawn, [prompt for name in names for prompt in PROMPTS[name]])
    return picture.quantize(_COLOURS, dither=Image.Dither.NONE)


if __name__ == "__main__":
    command_line.run(main)
