"""All that is to be measured of training steps on a GPU or two, in one call. Whatever ends is written at once.

python -m pipelines.measure.on_gpu -o FOLDER              # all parts, in the order of --list
python -m pipelines.measure.on_gpu -o FOLDER compiled start
python -m pipelines.measure.on_gpu -o FOLDER --small      # the same calls on a tiny model, without a GPU
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from k5cache.shared import console
from k5cache.shared.errors import RecipeError, RunError
from k5train.base.architecture import FULL_SIZE
from k5train.bench.baseline import time_baseline
from k5train.bench.case import Baseline, Case, Measured
from k5train.bench.steps import time_case
from k5train.commands.bench import gpu_to_measure
from pipelines.measure import command_line

ROOT = Path(__file__).parent.parent.parent
RESULTS, LOG = "measured.json", "measured.log"
_SMALL = {
    **FULL_SIZE, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16, "model_dim": 64, "ff_dim": 128,
    "num_text_blocks": 1, "num_visual_blocks": 6, "axes_dims": (8, 12, 12),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One thing to measure."""

    limit: float
    """Seconds after which it is stopped; the others go on."""
    what: Case | Baseline | Sequence[str]
    """A step of ours, diffusers' step, or the words after ``python -m``, in which ``{out}`` is a file for JSON, and
    ``{folder}`` one for large inputs, the same for all parts."""

    @property
    def is_step(self) -> bool:
        """Whether it is a step that is timed here."""
        return isinstance(self.what, Case | str)

    @property
    def has_numbers(self) -> bool:
        """Whether it writes JSON. Of others the exit code is the result, and ``LOG`` says more."""
        return isinstance(self.what, Case | str) or any("{out}" in word for word in self.what)


# Most of their time is imports and compiling, in processes that share the GPU easily.
_TESTS = (
    "pytest",
    "-q",
    "-rfEs",
    "-n",
    "4",
    "--dist",
    "load",
    *(f"-pno:{p}" for p in ("benchmark", "cacheprovider", "logging")),
)
PARTS: dict[str, Part] = {
    "graph-tests": Part(240, (*_TESTS, "tests/gpu/test_graph_gpu.py")),
    "resume-tests": Part(300, (*_TESTS, "tests/gpu/test_resume_gpu.py")),
    "eager": Part(120, "eager"),
    "compiled": Part(300, "compiled"),
    "dynamic-16": Part(120, Case("int8-dynamic", 16)),
    "quanto-16": Part(120, Case("int8-quanto", 16)),
    "dynamic-8.5": Part(120, Case("int8-dynamic", 8.5)),
    "quanto-8.5": Part(120, Case("int8-quanto", 8.5)),
    "quanto-4.5": Part(120, Case("int8-quanto", 4.5)),
    "quanto-3.8": Part(120, Case("int8-quanto", 3.8)),
    "dynamic-512": Part(120, Case("int8-dynamic", 16, 512)),
    "dynamic-768": Part(120, Case("int8-dynamic", 16, 768)),
    "dynamic-tread": Part(120, Case("int8-dynamic", 16, tread=0.5)),
    "start": Part(300, ("pipelines.measure.start", "--folder", "{folder}", "-o", "{out}")),
    "recipes": Part(300, ("pipelines.measure.recipes", "--seconds", "240", "-o", "{out}")),
    "memory": Part(150, ("pipelines.measure.on_gpu", "--left-over", "-o", "{out}")),
    "two-tests": Part(300, (*_TESTS, "tests/gpu/test_parallel_gpu.py", "tests/gpu/test_sweep_gpu.py")),
    "two-ray": Part(300, ("pipelines.measure.engines", "-o", "{out}")),
    "two-sweep": Part(
        580, ("pipelines.measure.sweep_gpus", "--gpus", "1", "--gpus", "2", "--folder", "{folder}", "-o", "{out}")
    ),
}
"""By the names that the command line takes. Those that begin with "two" need two GPUs, and run only if named."""


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which parts; all of them if none is named.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write to.")] = None,
    seconds: Annotated[float, typer.Option(help="Begin no part after this time, and end the last one then.")] = 570,
    inputs: Annotated[Path | None, typer.Option("--inputs", help="Keep checkpoint and cache here.")] = None,
    is_listed: Annotated[bool, typer.Option("--list", help="Print the parts and their limits.")] = False,
    is_small: Annotated[bool, typer.Option("--small", help="On a tiny model and the CPU: try the calls out.")] = False,
    is_left_over: Annotated[bool, typer.Option("--left-over", hidden=True)] = False,
    is_step: Annotated[bool, typer.Option("--step", hidden=True)] = False,
) -> None:
    """Measure what is open of training steps, each part with a limit of its own, and write each as it ends."""
    if is_listed:
        command_line.print_table("parts", ("part", "seconds"), [[n, f"{p.limit:g}"] for n, p in PARTS.items()], ())
        return
    wanted = list(names or (name for name in PARTS if not name.startswith("two")))
    if unknown := [name for name in wanted if name not in PARTS]:
        raise RecipeError(f"There is no part {', '.join(unknown)}", f"Use one of {', '.join(PARTS)}")
    if out is None:
        raise RecipeError("There is no folder to write to", "Use -o FOLDER")
    if is_left_over:
        out.write_text(json.dumps(left_over(is_small)), encoding="utf-8")
        return
    if is_step:
        _write(out, _step(wanted[0], is_small))
        return
    if not out.is_dir():
        raise RunError(f"There is no folder {out}", f"Run: mkdir -p {out}")
    if not is_small:
        gpu_to_measure(None)
    results = run_parts(wanted, out, seconds, is_small, inputs)
    if failed := [name for name, result in results.items() if "failed" in result]:
        raise RunError(f"Not measured: {', '.join(failed)}", f"See {out / RESULTS} and {out / LOG}")


def run_parts(
    wanted: Sequence[str], out: Path, seconds: float, is_small: bool, inputs: Path | None = None
) -> dict[str, Any]:
    """Run parts one after another; ``RESULTS`` in ``out`` has each as soon as it ends.

    Args:
        inputs: where large inputs are kept for another call. None: they are removed at the end.

    Returns:
        By the part's name: its numbers, or ``{"failed": why}``.
    """
    results: dict[str, Any] = {}
    end = time.monotonic() + seconds

    def done(name: str, result: Any) -> None:
        results[name] = result
        _write(out / RESULTS, results)
        console.note(f"{name}: {json.dumps(result)[:300]}")

    with tempfile.TemporaryDirectory(prefix="k5-on-gpu-") as folder, (out / LOG).open("w", encoding="utf-8") as log:
        for name in wanted:
            done(name, _run(name, Path(folder), log, end, is_small, inputs))
    return results


def _run(name: str, folder: Path, log: Any, end: float, is_small: bool, inputs: Path | None) -> dict[str, Any]:
    """Run a part in a process of its own, until it ends or has had its time.

    torch's profiler stays attached to its process, and steps that are captured there later take some milliseconds
    longer.
    """
    begin = time.monotonic()
    if end <= begin:
        return {"failed": "the time of the whole call was over"}
    log.write(f"== {name}\n")
    log.flush()
    part, path = PARTS[name], folder / f"{name}.json"
    process = subprocess.Popen(
        [sys.executable, "-m", *_words(name, path, is_small, inputs)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=os.name == "posix", env=command_line.environment(folder) | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        process.wait(min(part.limit, end - begin))
    except subprocess.TimeoutExpired:
        pass
    finally:
        is_over = process.poll() is None
        _stop(process)
    seconds = round(time.monotonic() - begin, 1)
    result = _read(path)
    if is_over:
        result["failed"] = f"stopped after {seconds:g} s"
    elif process.returncode:
        result["failed"] = f"exit code {process.returncode}"
    elif not result and part.has_numbers:
        result["failed"] = "ended without a result"
    elif not result:
        result["result"] = "passed"
    elif part.is_step and "failed" in result["result"]:
        result = result["result"]
    return result | {"seconds_of_part": seconds}


def _words(name: str, path: Path, is_small: bool, inputs: Path | None) -> list[str]:
    """What follows ``python -m``. Numbers are written to ``path``, large inputs beside it or to ``inputs``."""
    what = PARTS[name].what
    if isinstance(what, Case | str):
        return ["pipelines.measure.on_gpu", name, "--step", "-o", str(path), *(["--small"] if is_small else [])]
    words = [word.format(out=path, folder=inputs or path.parent / "inputs") for word in what]
    if not is_small or words[0] == "pytest":
        return words
    # Without a GPU the others only say that their options are known.
    return [*words, "--small"] if name == "memory" else [*words, "--help"]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started."""
    if os.name == "posix" and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _step(name: str, is_small: bool) -> dict[str, Any]:
    """Time a part in this process. What it raises is its result."""
    try:
        result = _timed(PARTS[name].what, is_small)
        return asdict(result) | {"limit": result.limit}
    except Exception as error:  # said beside the numbers of the other parts
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}


def _timed(what: Any, is_small: bool) -> Measured:
    device = torch.device("cpu" if is_small else "cuda")
    config, counts = (_SMALL, (1, 1)) if is_small else (FULL_SIZE, (6, 2))
    if isinstance(what, str):
        return time_baseline(config, device, *counts, how=what)  # type: ignore[arg-type]
    if is_small:  # the planner has no streaming on a CPU, and int8 of this size needs no cap
        what = replace(what, side=64, num_text_tokens=8, cap_gib=None, rank=4, execution="eager")
    return time_case(what, device, config, *counts)


def left_over(is_small: bool) -> dict[str, float]:
    """GiB of GPU memory that stay with torch after captured steps, once and twice in a process; 0 without a GPU."""
    sizes: dict[str, float] = {}
    for number in (1, 2):
        _timed(Case("int8-dynamic", 16), is_small)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for kind in ("reserved", "allocated"):
            num_bytes = getattr(torch.cuda, f"memory_{kind}")() if torch.cuda.is_available() else 0
            sizes[f"{kind}_gib_{number}"] = num_bytes / 2**30
    return sizes


def _read(path: Path) -> dict[str, Any]:
    """``{"result": what the file has}``; empty if there is none, or a process was stopped while it wrote."""
    try:
        return {"result": json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {}


def _write(path: Path, document: Any) -> None:
    """Replace a file at once: what reads it sees all of it."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    command_line.run(main)
