"""How is k5-micro made? Its VAE, then all that is trained on its latents, each in its part of the seconds there are.

    python -m pipelines.demo.micro .micro build/micro --total 580

``.micro`` is the folder that ``data.py`` wrote. ``--vae-start`` goes on from a VAE; what else follows is for ``train``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run both stages as one would type them; the second gets the time that the first has left."""
    parser = argparse.ArgumentParser(description="Make k5-micro.")
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--total", type=float, required=True, help="seconds for everything")
    parser.add_argument("--vae-seconds", type=float, help="of them, for the VAE; default: a third")
    parser.add_argument("--vae-start", type=Path, help="a VAE to go on from")
    parser.add_argument("--processes", default="16", help="that render")
    arguments, rest = parser.parse_known_args()
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = [arguments.data, arguments.out, "--compile", "--pictures", arguments.out / "drawings.npy"]
    shared += ["--processes", arguments.processes]
    # What is trained already is not to be shaken at the full rate again.
    start = ["--start", arguments.vae_start, "--lr", 7e-4] if arguments.vae_start else []
    seconds = arguments.vae_seconds or arguments.total / 3
    code = run("train_vae", *shared, "--total", f"{seconds:.0f}", *start)
    left = arguments.total - (time.monotonic() - started)
    return code or run("train", *shared, "--total", f"{left - 5:.0f}", *rest)  # 5: to import and to end


def run(stage: str, *arguments: object) -> int:
    command = [sys.executable, "-m", f"pipelines.demo.micro.{stage}", *map(str, arguments)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
