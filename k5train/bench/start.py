"""How long until the first step? A full-size checkpoint of random weights, started as a user starts it, twice.

Each start is a process of its own, watched from outside: what Python, imports, quantising, loading and compiling
take is all in it. Downloads nothing; writes 18 GB to a temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.base import architecture
from k5train.base.quantize import empty_transformer
from k5train.bench.features import model_folder, write_cache

SHARD_BYTES = 4 * 2**30


_CLI = "from k5train.cli import main; main()"


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
    """One process, from its begin to its end, or to its first step where it trains."""

    name: str
    seconds: float
    """Until its first optimizer step was done; where it makes none, until it ended."""
    own_bytes: int
    """The most host memory that was the process's own (RssAnon)."""
    resident_bytes: int
    """The same with the pages of mapped files (VmHWM), which the system may take back at any time."""


def bench_start(
    model: Mapping[str, Any] = architecture.FULL_SIZE,
    side: int = 1024,
    vram: str = "16GB",
    report: Callable[[str], None] = console.note,
) -> list[Start]:
    """Quantise, start once, start again, and load the weights alone. Each is also reported as soon as it is known.

    Raises:
        RunError: a process failed; the end of what it said is in the message.
    """
    found: list[Start] = []

    def add(*process: Any) -> None:
        found.append(watch(*process))
        report("  ".join(table(found)[-1]))

    with TemporaryDirectory(prefix="k5-start-") as name:
        root = Path(name)
        folder = model_folder(root / "model", model)
        begin = time.monotonic()
        write_checkpoint(folder)
        write_cache(root / "cache", model, side)
        report(f"a random checkpoint and a cache were written in {time.monotonic() - begin:.0f} s")
        run = ["run", str(root / "cache"), "--model", str(folder), "--set", "train.steps=3", "--set",
               "train.loss_limit=0", "--set", f"train.memory.vram={vram}", "-o"]  # fmt: skip
        add("quantise the base, once", [_CLI, "base", "prepare", "--model", str(folder)], root)
        for i, label in enumerate(("first start: blocks are compiled", "second start")):
            add(label, [_CLI, *run, str(root / f"run{i}")], root, root / f"run{i}" / "metrics.jsonl")
        add("loading the weights alone", [_LOAD, str(folder)], root)
    return found


def watch(name: str, program: list[str], root: Path, metrics: Path | None = None) -> Start:
    """Run ``python -c`` with its arguments, and look at it every 20 ms.

    Args:
        metrics: a run's; the first row with a loss is its first step, and the process is stopped there. None: its last
            line is seconds, or it is timed to its end.

    Raises:
        RunError: it failed, or made no step.
    """
    with (root / "log").open("w+") as log:
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", *program], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"K5_HOME": str(root / "home"), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")},
        )  # fmt: skip
        own = resident = 0
        stepped: float | None = None
        while process.poll() is None:
            time.sleep(0.02)
            now = _memory(process.pid)
            own, resident = max(own, now.get("RssAnon", 0)), max(resident, now.get("VmHWM", 0))
            if metrics and stepped is None and metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8"):
                stepped = time.monotonic() - begin
                process.kill()  # what follows, saving above all, is not what is timed
        seconds = stepped or time.monotonic() - begin
        log.seek(0)
        said = log.read().strip().splitlines()
    if (process.returncode or metrics) and stepped is None:
        raise RunError(f"{name}: exit code {process.returncode}: {' | '.join(said[-3:])}", "Run it by hand to see more")
    if program[0] == _LOAD:
        seconds = float(said[-1])
    return Start(name, seconds, own, resident)


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it has just ended
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in words}


def write_checkpoint(folder: Path) -> None:
    """bf16 safetensors in the hub's layout, in shards, of random numbers; replaces the folder's placeholder."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    transformer = empty_transformer(folder)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for name, meta in transformer.state_dict().items():
        tensor = torch.randn(meta.shape, generator=generator, device=generator.device) * 0.02
        if size + 2 * tensor.numel() > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.bfloat16().cpu()
        size += 2 * tensor.numel()
    target = folder / "transformer"
    (target / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(parts):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, target / file)
        weight_map |= dict.fromkeys(tensors, file)
        tensors.clear()
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


COLUMNS = ("process", "seconds", "own host memory", "with mapped files")


def table(found: list[Start]) -> list[list[str]]:
    """Results as rows of text."""
    return [
        [s.name, f"{s.seconds:.1f}", f"{s.own_bytes / 2**30:.2f} GiB", f"{s.resident_bytes / 2**30:.2f} GiB"]
        for s in found
    ]
