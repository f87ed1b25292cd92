"""Runs of several processes on the CPU, each forked from one that has imported everything. ``python -m tests.ranks``.

A line of JSON on stdin is a job: ``words``, the command line of each process; and ``at``, what happens to one of them
in the update after a step: ``[rank, step, "kill"]``, ``"stop"``, ``"twice"`` (stopped by torchrun and by its cluster),
``"hang"`` or ``"fail"``. Step -1 is when they have met, before torch connects them, and -2 before each sum over all.
A line of JSON answers: the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIGNALS = {
    "kill": [signal.SIGKILL], "stop": [signal.SIGINT], "twice": [signal.SIGTERM, signal.SIGINT],
    "hang": [signal.SIGSTOP],
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How the processes of a job ended, by rank."""

    codes: list[int]
    said: list[str]
    seconds: float


class Ranks:
    """Does jobs, one after another.

    Args:
        folder: where outputs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.ranks", str(folder)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        )  # fmt: skip

    def __call__(self, *words: Sequence[object], at: tuple[int, int, str] | None = None) -> Ended:
        """Run these command lines, each in a process, as torchrun would."""
        assert self.process.stdin
        assert self.process.stdout
        job = {"words": [[str(word) for word in line] for line in words], "at": at}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: Path) -> None:
    from k5train.training import carry_out, follow, picture_rows  # noqa: F401 (what a run imports when it begins)

    for number, line in enumerate(sys.stdin):
        job, port, began, pids = json.loads(line), free_port(), time.monotonic(), []
        paths = [folder / f"{number}-{rank}.txt" for rank in range(len(job["words"]))]
        for rank, words in enumerate(job["words"]):
            pid = os.fork()
            if pid == 0:
                be_rank(rank, len(job["words"]), port, words, job["at"], paths[rank])
            pids.append(pid)
        hangs = job["at"][0] if job["at"] and job["at"][2] == "hang" else None
        ended = {}
        for rank in sorted(range(len(pids)), key=lambda rank: rank == hangs):  # who hangs must not be waited for
            if rank == hangs:
                os.kill(pids[rank], signal.SIGKILL)
            ended[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
        codes = [ended[rank] for rank in range(len(pids))]
        said = [path.read_text(encoding="utf-8") for path in paths]
        print(json.dumps({"codes": codes, "said": said, "seconds": time.monotonic() - began}), flush=True)


def be_rank(rank: int, size: int, port: int, words: list[str], at: list | None, path: Path) -> None:
    """Be one process of a job, to its end."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if size > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in world.items()}})
    from k5train.cli import main
    from k5train.parallel import line
    from k5train.parallel.together import Together
    from k5train.training.loop import Loop
    from tests.runs import only_training

    if at and at[2] == "twice":
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
    if at and at[2] == "hang":
        line.BEAT, line.SILENT = 0.1, 40
    accumulate, code = Loop.step, 1

    def strike(step):
        if at and (rank, step) == tuple(at[:2]):
            if at[2] == "fail":
                raise ValueError("of a bug")
            for number in SIGNALS[at[2]]:
                os.kill(os.getpid(), number)

    def step(self, *arguments):
        strike(self.progress.step)
        return accumulate(self, *arguments)

    def connecting(self, *arguments, **options):
        strike(-1)
        return connect(self, *arguments, **options)

    def adding(self, values):
        strike(-2)
        return add(self, values)

    connect, add = Together.connect, Together.add_up
    Loop.step, Together.connect, Together.add_up = step, connecting, adding
    sys.argv = ["k5train", *words]
    try:
        with only_training():
            add_up() if words == ["add-up"] else main()
            code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def add_up() -> None:
    """Print the deterministic sums of what three processes have: 1, 1e8 and -1e8, and the same in another order."""
    import torch

    from k5train.parallel.together import joined
    from k5train.parallel.world import world_of

    world = world_of()
    assert world is not None
    with joined(world, "cpu") as together:
        together.connect(torch.device("cpu"), is_deterministic=True)
        values = torch.tensor([[1.0, 1e8, -1e8][world.rank], [1e8, -1e8, 1.0][world.rank]])
        together.add_up(values)
        everyones = together.gather(values.tolist())
        print(everyones)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
