"""How long does a run take to its first step? A full-size checkpoint of random weights, started twice as a user would.

Each start is a process of its own that is watched from outside, so the figures include Python, imports, quantising,
loading and compiling. Downloads nothing; writes 18 GB to a temporary folder, or to --folder, where they are used again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.base.architecture import FULL_SIZE
from k5train.commands.bench import gpu_to_measure
from pipelines.measure import command_line, stacks
from pipelines.measure.random_inputs import model_folder, write_cache, write_checkpoint

PLACES = ("innermost function of ours", "seconds")
COLUMNS = ("process", "seconds", "own host memory", "with mapped files")

_CLI = "from k5train.cli import main; main()"
_WATCHED = "import sys; from pathlib import Path; from pipelines.measure.stacks import sample; sample(Path({path!r})); "
_LOAD = """
import sys, time, torch
from pathlib import Path
from k5train.base.prepared import load_prepared
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.zeros(1, device=device)
begin = time.monotonic()
load_prepared(Path(sys.argv[1]), torch.bfloat16, device)
if device.type == "cuda":
    torch.cuda.synchronize()
print(time.monotonic() - begin)
"""


@dataclass(frozen=True)
class Start:
    """What one process took."""

    name: str
    seconds: float
    """Until its first optimizer step was done, or until it ended if it makes no step."""
    own_bytes: int
    """The most host memory that was the process's own (RssAnon)."""
    resident_bytes: int
    """The same with the pages of mapped files (VmHWM), which the system may take back at any time."""
    places: tuple[tuple[str, float], ...] = ()
    """Where in our code the time went, if somebody looked: functions, imports and calls of libraries included."""


def main(
    folder: Annotated[Path | None, typer.Option("--folder", help="Keep checkpoint and cache here.")] = None,
    out: command_line.Out = None,
) -> None:
    """Time a run's first and second start, and measure their host memory. Needs a GPU and 18 GB of disk."""
    gpu_to_measure(out)
    starts: list[Start] = []

    def done(start: Start) -> None:
        starts.append(start)
        console.note("  ".join(table_rows(starts)[-1]))
        command_line.write_json(out, [asdict(each) for each in starts])

    with ExitStack() as stack:
        time_starts(folder or Path(stack.enter_context(TemporaryDirectory(prefix="k5-start-"))), done)
    command_line.print_table("full size, random weights", COLUMNS, table_rows(starts), numbers=COLUMNS[1:])
    for start in starts:
        if start.places:
            rows = [[place, f"{seconds:.2f}"] for place, seconds in start.places]
            command_line.print_table(f"{start.name}: where the time goes", PLACES, rows, numbers=PLACES[1:])


def time_starts(
    root: Path,
    done: Callable[[Start], object],
    model: Mapping[str, Any] = FULL_SIZE,
    side: int = 1024,
    vram: str = "16GB",
) -> None:
    """Quantise, start once and twice again, look where a start spends its time, and load the weights alone.

    Args:
        root: what is there of an earlier call is used again, so the base may be quantised already.
        done: called with each as soon as it is known.

    Raises:
        RunError: a process failed. The message has the last lines that it printed.
    """
    folder = write_inputs(root, model, side)
    run = ["run", str(root / f"cache-{side}"), "--model", str(folder), "--set", "train.steps=3", "--set",
           "train.optim.warmup_steps=0", "--set",
           "train.loss_limit=0", "--set", f"train.memory.vram={vram}", "-o"]  # fmt: skip
    if not (root / "home" / "base").is_dir():
        done(watch("quantise the base, once", [_CLI, "base", "prepare", "--model", str(folder)], root))
    _write_out()
    for number, label in enumerate(("first start: blocks are compiled", "second start", "third start")):
        out = root / f"run{number}"
        shutil.rmtree(out, ignore_errors=True)
        done(watch(label, [_CLI, *run, str(out)], root, out / "metrics.jsonl"))
    seen, out = root / "stacks", root / "watched"
    shutil.rmtree(out, ignore_errors=True)
    program = [_WATCHED.format(path=str(seen)) + _CLI, *run, str(out)]
    watched = watch("another start, watched", program, root, out / "metrics.jsonl")
    done(replace(watched, places=tuple(stacks.longest(seen.read_text().splitlines(), 16))))
    done(watch("loading the weights alone", [_LOAD, str(folder)], root))


def write_inputs(root: Path, model: Mapping[str, Any], side: int) -> Path:
    """Write a random checkpoint and a cache, unless they are there; returns the checkpoint's folder."""
    folder, cache = root / "model", root / f"cache-{side}"
    begin = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        write_checkpoint(model_folder(folder, model))
    if not cache.is_dir():
        write_cache(cache, model, side)
    console.note(f"Wrote a random checkpoint and a cache in {time.monotonic() - begin:.0f} s")
    return folder


def _write_out() -> None:
    """Wait until what was written is on the disk, which would slow down whatever comes next."""
    if hasattr(os, "sync"):
        os.sync()


def watch(name: str, program: list[str], root: Path, metrics: Path | None = None) -> Start:
    """Run ``python -c`` with a program and its arguments, and look at it every 20 ms.

    Args:
        metrics: a run's metrics. Its first row with a loss is the first step, and the process is stopped there. None:
            the process is timed to its end; ``_LOAD`` prints its own seconds in its last line.

    Raises:
        RunError: the process failed or made no step.
    """
    with (root / "log").open("w+") as log:
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", *program], stdout=log, stderr=subprocess.STDOUT,
            env=command_line.environment(root)
            | {"K5_HOME": str(root / "home"), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")},
        )  # fmt: skip
        own = resident = 0
        first_step: float | None = None
        while process.poll() is None:
            time.sleep(0.02)
            memory = _memory(process.pid)
            own, resident = max(own, memory.get("RssAnon", 0)), max(resident, memory.get("VmHWM", 0))
            if metrics and first_step is None and metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8"):
                first_step = time.monotonic() - begin
                process.kill()  # what follows, above all saving, is not part of the start
        seconds = first_step or time.monotonic() - begin
        log.seek(0)
        lines = log.read().strip().splitlines()
    if (process.returncode or metrics) and first_step is None:
        problem = f"{name}: exit code {process.returncode}: {' | '.join(lines[-3:])}"
        raise RunError(problem, "Run it by hand to see more")
    if program[0] == _LOAD:
        seconds = float(lines[-1])
    return Start(name, seconds, own, resident)


def _memory(pid: int) -> dict[str, int]:
    """Bytes of each kind of memory in ``/proc/PID/status``; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in words}


def table_rows(starts: list[Start]) -> list[list[str]]:
    """Results as rows of text."""
    return [
        [s.name, f"{s.seconds:.1f}", f"{s.own_bytes / 2**30:.2f} GiB", f"{s.resident_bytes / 2**30:.2f} GiB"]
        for s in starts
    ]


if __name__ == "__main__":
    command_line.run(main)
