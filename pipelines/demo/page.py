"""What does `make ui` run? The page over the demo: it encodes the pictures and trains the LoRA while one looks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from k5train.ui.jobs import queue
from k5train.ui.project import Project, open_project

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "pipelines" / "demo"
MODEL = DEMO / "k5-micro"
PROJECT = ROOT / "build" / "emoji"


def main() -> int:
    """Lay out a project, put into its queue what the demo does, and serve the page over it until Ctrl-C."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in demo.py
    begin(lay_out(PROJECT))
    command = ["k5train", "ui", "--folder", str(PROJECT), "--model", str(MODEL), *sys.argv[1:]]
    try:
        return subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=False).returncode
    except KeyboardInterrupt:  # the page got it too, and has said so
        return 0


def lay_out(folder: Path) -> Project:
    """A project with the demo's pictures and its recipe. What is there already stays."""
    pictures = folder / "datasets" / "emoji"
    if not pictures.exists():
        shutil.copytree(DEMO / "images", pictures)
    recipe = folder / "demo.toml"
    if not recipe.exists():
        text = (DEMO / "demo.toml").read_text(encoding="utf-8")
        given = 'path = "pipelines/demo/k5-micro"'
        assert given in text
        recipe.write_text(text.replace(given, f"path = '{MODEL}'"), encoding="utf-8")
    return open_project(folder, str(MODEL))


def begin(project: Project) -> None:
    """Put an encode and a run into the queue, unless they are there already or were done."""
    begun = {job.about for job in queue.jobs(project)}
    commands = {
        "cache/emoji": ["k5cache", "encode", "datasets/emoji", "--recipe", "demo.toml", "-o", "cache/emoji"],
        "runs/emoji": ["k5train", "run", "cache/emoji", "--recipe", "demo.toml", "-o", "runs/emoji"],
    }
    for about, argv in commands.items():
        if about not in begun and not (project.root / about).exists():
            kind = "run" if argv[1] == "run" else "encode"
            queue.add(project, argv, f"{kind} {Path(about).name}", kind, about, uses=[argv[2]])


if __name__ == "__main__":
    sys.exit(main())
