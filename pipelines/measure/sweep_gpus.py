"""How much faster is a sweep on several GPUs than on one? The same runs over random weights of full size, on each.

    python -m pipelines.measure.sweep_gpus --gpus 1 --gpus 2 --steps 600

Each sweep is a command as a user would type it, timed from its beginning to its end, with the base prepared and the
blocks compiled before, as of a second sweep. Downloads nothing; writes 18 GB to a temporary folder, or to --folder,
where they are used again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5cache.shared.gpus import choose_slots
from k5cache.shared.sealed import unseal
from k5train.base.architecture import FULL_SIZE
from pipelines.measure import command_line
from pipelines.measure.start import write_inputs

COLUMNS = ("GPUs", "seconds", "faster", "seconds a run", "faster, without the start")
RATES = ("1e-4", "2e-4", "3e-4", "4e-4")


@dataclass(frozen=True)
class Timed:
    """One sweep."""

    num_gpus: int
    seconds: float
    """From the command's beginning to its end."""
    of_runs: tuple[float, ...]
    """What each run took, by its own clock: from its first step to its last, with what is measured between."""


def main(
    gpus: Annotated[list[int], typer.Option("--gpus", help="How many. May be repeated; the first is compared with.")],
    steps: Annotated[int, typer.Option("--steps", help="Of each of the four runs.")] = 600,
    side: Annotated[int, typer.Option("--side", help="Of the pictures, in pixels.")] = 512,
    folder: Annotated[Path | None, typer.Option("--folder", help="Keep checkpoint and cache here.")] = None,
    out: command_line.Out = None,
) -> None:
    """Time a sweep of four runs on each number of GPUs. Needs the GPUs and 18 GB of disk."""
    choose_slots(max(gpus))
    timed: list[Timed] = []

    def done(sweep: Timed) -> None:
        timed.append(sweep)
        console.note("  ".join(table_rows(timed)[-1]))
        command_line.write_json(out, [asdict(each) for each in timed])

    with ExitStack() as stack:
        time_sweeps(
            folder or Path(stack.enter_context(TemporaryDirectory(prefix="k5-sweep-"))), gpus, steps, side, done
        )
    setting = f"sweep of {len(RATES)} runs, {steps} steps at {side}x{side}, random weights"
    command_line.print_table(setting, COLUMNS, table_rows(timed), numbers=COLUMNS)


def time_sweeps(root: Path, counts: Sequence[int], steps: int, side: int, done: Callable[[Timed], object]) -> None:
    """Prepare the base, compile in a short sweep, then time a sweep for each number of GPUs.

    A sweep of one run, and not a run: it also measures losses, which is compiled apart.

    Args:
        done: called with each as soon as it is known.

    Raises:
        RunError: a command failed. The message has the last lines that it printed.
    """
    model = write_inputs(root, FULL_SIZE, side)
    common = [str(root / f"cache-{side}"), "--model", str(model), "--set", "train.optim.warmup_steps=0", "--set",
              "train.loss_limit=0"]  # fmt: skip
    grid = ["--grid", f"train.optim.lr={','.join(RATES)}", "--set", f"train.steps={steps}"]
    shutil.rmtree(root / "warm", ignore_errors=True)
    warm = ["--grid", f"train.optim.lr={RATES[0]}", "--set", "train.steps=3", "--gpus", "1"]
    run(root, "sweep", *common, *warm, "-o", str(root / "warm"))
    for count in counts:
        target = root / f"sweep-on-{count}"
        shutil.rmtree(target, ignore_errors=True)
        seconds = run(root, "sweep", *common, *grid, "--gpus", str(count), "-o", str(target))
        done(Timed(count, seconds, tuple(seconds_of(path) for path in sorted(target.glob("*/result.json")))))


def run(root: Path, *arguments: str) -> float:
    """Run a command of ``k5train``; returns its seconds."""
    begin = time.monotonic()
    env = os.environ | {"K5_HOME": str(root / "home"), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")}
    done = subprocess.run([sys.executable, "-m", "k5train", *arguments], env=env, check=False, capture_output=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()[-4:]
        raise RunError(f"k5train {arguments[0]}: exit code {done.returncode}: {' | '.join(lines)}", "Run it by hand")
    return seconds


def seconds_of(result: Path) -> float:
    """How long a run took, as its ``result.json`` says."""
    return float(unseal(result.read_bytes())["seconds"])


def table_rows(timed: Sequence[Timed]) -> list[list[str]]:
    """Results as rows of text; the first sweep is what the others are compared with."""
    rows = []
    for sweep in timed:
        mean, of_first = (sum(of.of_runs) / len(of.of_runs) for of in (sweep, timed[0]))
        alone = sweep.num_gpus / timed[0].num_gpus * of_first / mean
        rows.append([str(sweep.num_gpus), f"{sweep.seconds:.0f}", f"{timed[0].seconds / sweep.seconds:.2f}",
                     f"{mean:.1f}", f"{alone:.2f}"])  # fmt: skip
    return rows


if __name__ == "__main__":
    command_line.run(main)
