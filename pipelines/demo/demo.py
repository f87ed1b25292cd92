"""What does `make demo` run? The commands of a user who teaches a small model a style that it has never seen."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = Path("pipelines/demo")
BUILD = Path("build/demo")
RECIPE = DEMO / "demo.toml"


def main() -> int:
    """Encode, inspect, train, compare. Returns the exit code of the first command that fails, or 0."""
    os.chdir(ROOT)
    # The tensors are small: on a busy machine threads wait for each other, and on a quiet one two were no faster.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, cache = time.monotonic(), BUILD / "cache"
    commands = [
        ["k5cache", "encode", f"{DEMO}/images", "--recipe", f"{RECIPE}", "-o", f"{cache}"],
        ["k5cache", "info", f"{cache}"],
    ]
    for command in commands:
        if code := show_and_run(command):
            return code
    run = unused_folder(BUILD / "runs" / "demo")
    if code := show_and_run(["k5train", "run", f"{cache}", "--recipe", f"{RECIPE}", "-o", f"{run}"]):
        return code
    picture = compare(run)
    print(ending(run, picture, time.monotonic() - started))
    return 0


def show_and_run(command: list[str]) -> int:
    """Print a command as one would type it, run it from this environment and return its exit code."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    code = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=False).returncode
    if code:
        print(f"\nThat command failed with exit code {code}; the demo stops here.", file=sys.stderr)
    return code


def unused_folder(run: Path) -> Path:
    """``run``; or ``run-2``, ``run-3`` ... if the demo has run before, because no run is overwritten."""
    candidate, number = run, 2
    while candidate.exists():
        candidate, number = run.with_name(f"{run.name}-{number}"), number + 1
    return candidate


def compare(run: Path) -> Path:
    """Write a sheet, one column per prompt: the base's picture, the LoRA's and the artist's, which neither has seen."""
    from PIL import Image

    from k5cache.shared.console import quiet_libraries

    quiet_libraries()
    from k5train.pictures.sheet import grid

    prompts = tomllib.loads(RECIPE.read_text(encoding="utf8"))["train"]["validation"]["prompts"]
    concepts = [prompt.split(",")[0] for prompt in prompts]
    steps = sorted((run / "samples").glob("step-*"))
    files = [
        ("before", [steps[0] / f"{i:02}.png" for i in range(len(concepts))]),
        ("with the LoRA", [steps[-1] / f"{i:02}.png" for i in range(len(concepts))]),
        ("the set's own", [DEMO / "held_out" / f"{concept.replace(' ', '_')}.png" for concept in concepts]),
    ]
    rows = [(label, [Image.open(path).convert("RGB") for path in paths]) for label, paths in files]
    picture = run / "compared.png"
    grid(rows, concepts).save(picture)
    return picture


def ending(run: Path, picture: Path, seconds: float) -> str:
    """The demo's last words: its files, and what to run next on one's own images."""
    programs = Path(sys.executable).parent
    programs = programs.relative_to(ROOT) if programs.is_relative_to(ROOT) else programs
    return f"""
The demo took {seconds:.0f} s.

  LoRA      {run / f"{run.name}.safetensors"}
  pictures  {picture}   before, with the LoRA, and as the style's own artist drew it

The prompts name things that are not among the 40 pictures. With your own images (a folder of them, each with a .txt
caption beside it) and the published model, from the hub or a folder given with --model:

  {programs}/k5cache encode datasets/my_images
  {programs}/k5train run cache/my_images"""


if __name__ == "__main__":
    sys.exit(main())
