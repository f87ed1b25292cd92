"""What does `make demo` run? The commands a user would run, on the demo's pictures and a toy model made on the spot."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = Path("pipelines/demo")
BUILD = Path("build/demo")
RECIPE = DEMO / "demo.toml"


def main() -> int:
    """Make the model, encode, look, train. Returns the exit code of the first command that fails, else 0."""
    os.chdir(ROOT)
    # Toy tensors: on a busy machine threads wait for each other. Training took 46 s on one thread at load 6; on two at
    # load 9 it was stopped after 9 minutes, two thirds done. On a quieter machine two threads took 52 s, no less.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, cache = time.monotonic(), BUILD / "cache"
    before = [
        ["python", f"{DEMO}/make_checkpoint.py", f"{BUILD}/model"],
        ["k5cache", "encode", f"{DEMO}/images", "--recipe", f"{RECIPE}", "-o", f"{cache}"],
        ["k5cache", "info", f"{cache}"],
    ]
    for command in before:
        if code := show_and_run(command):
            return code
    run = free(BUILD / "runs" / "demo")
    if code := show_and_run(["k5train", "run", f"{cache}", "--recipe", f"{RECIPE}", "-o", f"{run}"]):
        return code
    print(ending(run, time.monotonic() - started))
    return 0


def show_and_run(command: list[str]) -> int:
    """Print a command as one would type it, run it from this environment and return its exit code."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    code = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=False).returncode
    if code:
        print(f"\nThat command failed with exit code {code}; the demo stops here.", file=sys.stderr)
    return code


def free(run: Path) -> Path:
    """``run``, or ``run-2``, ``run-3`` ... where the demo has run before: a run is never written over."""
    candidate, number = run, 2
    while candidate.exists():
        candidate, number = run.with_name(f"{run.name}-{number}"), number + 1
    return candidate


def ending(run: Path, seconds: float) -> str:
    """What was made, where it lies and what to run next on one's own images."""
    bin_ = Path(sys.executable).parent
    shown = bin_.relative_to(ROOT) if bin_.is_relative_to(ROOT) else bin_
    return f"""
The demo took {seconds:.0f} s.

  LoRA      {run / f"{run.name}.safetensors"}
  pictures  {run / "samples.png"}   one row a checkpoint, the first before training; one column a prompt

The toy model's weights are random, so its pictures are too. With your own images (a folder of them, each with a .txt
caption beside it) and the published model, from the hub or a folder given with --model:

  {shown}/k5cache encode datasets/my_images
  {shown}/k5train run cache/my_images"""


if __name__ == "__main__":
    sys.exit(main())
