"""What is a trial, what can be wrong after it, and how is a command run, or killed, in it?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests import failing_calls
from tests.cli import Cli, Done

Verdict = Literal["lost", "silent", "traceback"]


@dataclass(frozen=True)
class Trial:
    """One trial. The same values make the same trial again, apart from the instant at which a kill comes."""

    row: str
    """Of the table."""
    case: str
    """Which command is killed or fails, or which file is damaged."""
    seed: int
    count: int = 1
    """Kills, flips or failing calls."""
    error: int = 0
    """Of the failing call; 0 in other trials."""


class Wrong(Exception):
    """A trial has found something.

    Args:
        verdict: ``lost``: something saved is gone, or the next command does not go on. ``silent``: another result, and
            nothing was said. ``traceback``: no sentence, or one that does not name the file.
    """

    def __init__(self, verdict: Verdict, problem: str) -> None:
        super().__init__(problem)
        self.verdict = verdict


@dataclass(frozen=True)
class Place:
    """Where trials are made."""

    model: Path
    """The toy checkpoint."""
    template: Path
    """What a trial begins with a copy of. Nothing changes it."""
    scratch: Path
    """A folder that no other process uses."""

    @contextmanager
    def copy(self, name: str = "trial") -> Iterator[Path]:
        """A copy of the template, until the end of the block."""
        root = self.scratch / name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.template, root, symlinks=True)
        yield root
        shutil.rmtree(root)


def run(root: Path, line: Sequence[str], seconds: float | None = None) -> Done | None:
    """Run a command line in a forked process, in the folder ``root``, where K5_HOME is too.

    Args:
        line: ``k5cache`` or ``k5train`` and its arguments.
        seconds: kill it after this time. None: never.

    Returns:
        what it said; None if it was killed.

    Raises:
        Wrong: it ended with a traceback, or died by itself.
    """
    report = root.parent / "said.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        _in_child(root, line, report)
    if seconds is not None:
        _wait(child, seconds)
        os.kill(child, signal.SIGKILL)  # safe: nobody has waited for it, so the id is not reused
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL and seconds is not None:
        return None
    if not report.exists():
        raise Wrong("traceback", f"{' '.join(line)}: the process died with {code}")
    done = Done(**json.loads(report.read_text(encoding="utf-8")))
    if done.code not in (0, 1, 2) or "Traceback" in done.err:
        raise Wrong("traceback", f"{' '.join(line)}: exit code {done.code}: {done.err[-3000:]}")
    return done


def _in_child(root: Path, line: Sequence[str], report: Path) -> None:
    from k5cache.cli import app as k5cache
    from k5train.cli import app as k5train

    done = Done(1, "", "Traceback: the process was interrupted")
    try:
        os.environ["K5_HOME"] = str(root / "home")
        done = Cli(root)({"k5cache": k5cache, "k5train": k5train}[line[0]], *line[1:])
    except BaseException:
        done = Done(1, "", traceback.format_exc())
    finally:
        report.write_text(json.dumps(asdict(done)), encoding="utf-8")
        os._exit(0)


def _wait(child: int, seconds: float) -> None:
    """Wait until the child has ended, or the time is over. It stays to be waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))


def must(root: Path, *line: str) -> Done:
    """Run a command that has to succeed.

    Raises:
        Wrong: it was refused.
    """
    done = run(root, line)
    assert done is not None
    if done.code:
        raise Wrong("lost", f"{' '.join(line)} does not go on: {done.err[-1500:]}")
    return done


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """A name for the bits of tensors."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]


def rows_of(root: Path) -> dict[str, str]:
    """All that a trainer reads of a cache: path or prompt -> its bits."""
    from k5cache.store.reader import open_cache
    from tests import crash_trials

    return {name: digest(tensors) for name, tensors in crash_trials.rows_of(open_cache(root)).items()}


def finished_cache(root: Path) -> dict[str, str]:
    """The rows of a cache that is whole, with nothing half written in it.

    Raises:
        Wrong: it is not.
    """
    from k5cache.upkeep.verify import verify_cache

    if problems := verify_cache(root).problems:
        raise Wrong("lost", f"verify: {'; '.join(problems)}")
    _check_no_leftovers(root)
    return rows_of(root)


def finished_run(root: Path, metrics: bool = True) -> dict[str, Any]:
    """All that a run left: the bits of its state and of every LoRA, and its numbers without those of the clock.

    Args:
        metrics: whether the losses of every step are there.

    Raises:
        Wrong: it is not whole, or something is left half written.
    """
    from safetensors.torch import load_file

    from k5train.runs.folder import Run
    from tests.runs import metrics_of, numbers, state_of

    checked_run(root)
    _check_no_leftovers(root)
    run = Run(root)
    files = {str(p.relative_to(root)): load_file(p) for p in _loras(root)}
    files["state"] = state_of(root) if any(run.state.glob("step-*")) else {}  # a finished run of a sweep has none
    left: dict[str, Any] = {
        name: {key: digest([tensor]) for key, tensor in tensors.items()} for name, tensors in sorted(files.items())
    }
    if not run.result.is_file():
        raise Wrong("lost", f"{root} has no result.json")
    return {**left, "metrics": numbers(metrics_of(root))} if metrics else left


def finished_base(root: Path) -> dict[str, str]:
    """The bytes of the prepared base under a folder's K5_HOME. Raises as ``finished_cache``."""
    bases = root / "home" / "base"
    _check_no_leftovers(bases)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bases.iterdir()}


def checked_run(root: Path) -> int:
    """Check everything in a run that has a checksum. Returns the step of its newest state, 0 without one.

    Raises:
        Wrong: something is damaged.
    """
    from k5cache.shared.errors import RunError
    from k5train.runs.folder import Run
    from k5train.runs.metrics import check_metrics
    from k5train.runs.resume_state import latest_state
    from k5train.runs.written import check_recorded

    run = Run(root)
    try:
        saved = latest_state(run.state)
        if saved:
            saved.check()
            check_metrics(run.metrics, saved.progress.metrics)
        for lora in _loras(root):
            if not check_recorded(lora):
                raise Wrong("lost", f"{lora} has no checksum")
    except RunError as error:
        raise Wrong("lost", f"{error.problem}. {error.fix}") from None
    return saved.progress.step if saved else 0


def _loras(root: Path) -> list[Path]:
    from k5train.runs.folder import Run

    return [*root.glob("[!.]*.safetensors"), *Run(root).checkpoints().values()]


def _check_no_leftovers(root: Path) -> None:
    hidden = [path for path in root.rglob(".*") if path.name != ".lock" and not failing_calls.is_empty(path)]
    left = [str(path.relative_to(root)) for path in hidden]
    if left:
        raise Wrong("lost", f"left half written in {root.name}: {left}")
