"""The command: ``python -m pipelines.measure.settings``. Trains the runs, judges them and prints the tables."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.files import write_json
from pipelines.measure import command_line, pool
from pipelines.measure.settings import pictures, tables, trial
from pipelines.measure.settings.grid import SETTINGS, shortened


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting on each concept.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with one thread each.")] = os.cpu_count() or 1,
    minutes: Annotated[float, typer.Option(help="Stop after this time; the same command with -o goes on.")] = 60,
    share: Annotated[float, typer.Option(help="This share of the steps: to see that it runs.")] = 1.0,
    only: Annotated[str, typer.Option(help="Only this group of settings.")] = "",
    out: command_line.Out = None,
) -> None:
    """Train k5-micro on three concepts with many settings, and measure what was learned and forgotten. Needs no GPU."""
    until = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    settings = tuple(shortened(s, share) for s in SETTINGS if not only or s.group == only)
    if not settings:
        groups = ", ".join(dict.fromkeys(s.group for s in SETTINGS))
        raise RecipeError(f"There is no group of settings called {only}", f"Give one of: {groups}")
    with tempfile.TemporaryDirectory(prefix="k5-settings-") as folder:
        file = out or Path(folder) / "settings.json"
        place = trial.prepare(Path(folder))
        jobs = {name: (task,) for name, task in trial.tasks(place, seeds, settings).items()}
        setting = {"share": share}
        found = pool.do_all(trial.make, jobs, file, setting, workers, console.note, until)
        if out:
            write_json(out, pool.read_results(out, setting) | {"machine": trial.machine()})
            for sheet in pictures.write_sheets(place, out):
                console.note(f"wrote {sheet}")
        console.note(f"{len(found)} of {len(jobs)} runs are done")
        typer.echo(tables.tables(found))


if __name__ == "__main__":
    command_line.run(main)
