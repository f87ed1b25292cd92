"""How is k5-micro trained? First its VAE, then everything that learns from its latents; each gets a part of the time.

    python -m pipelines.demo.micro .micro build/micro --total 580

``.micro`` is the folder that ``data.py`` wrote. ``--vae-start`` continues from a VAE. Other options go to ``train``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run both stages as commands. The second gets the time that the first leaves."""
    parser = argparse.ArgumentParser(description="Make k5-micro.")
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--total", type=float, required=True, help="seconds for everything")
    parser.add_argument("--vae-seconds", type=float, help="how many of them the VAE gets; default: a third")
    parser.add_argument("--vae-start", type=Path, help="a VAE to continue from")
    parser.add_argument("--processes", default="16", help="how many processes render")
    arguments, rest = parser.parse_known_args()
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = [arguments.data, arguments.out, "--compile", "--pictures", arguments.out / "drawings.npy"]
    shared += ["--processes", arguments.processes]
    # A trained VAE should not be disturbed by the full learning rate again.
    start = ["--start", arguments.vae_start, "--lr", 7e-4] if arguments.vae_start else []
    seconds = arguments.vae_seconds or arguments.total / 3
    code = run("train_vae", *shared, "--total", f"{seconds:.0f}", *start)
    left = arguments.total - (time.monotonic() - started)
    return code or run("train", *shared, "--total", f"{left - 5:.0f}", *rest)  # 5 s to import and to finish


def run(stage: str, *arguments: object) -> int:
    command = [sys.executable, "-m", f"pipelines.demo.micro.{stage}", *map(str, arguments)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
