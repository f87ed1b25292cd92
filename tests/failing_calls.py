"""Lets every call of a command on the disk fail once: a sentence, nothing lost, and the same command goes on.

The failing calls are those of failing_calls.c, which must be loaded before Python starts. So a test starts this module
as a program, which forks a child for every failing call. The encoders and libraries are loaded once, before.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from safetensors.torch import load_file

from k5cache.shared import disk_errors
from tests.cli import Cli, Done

STAYS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a full disk stays full; another error passes
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
SOURCE = Path(__file__).with_suffix(".c")
MODEL_OPTIONS = ("--set", "cache.resolution=64")
OF_CACHES = ("encode", "encode again", "prompts add", "gc", "merge")
"""The commands of k5cache; the others are of k5train."""


@dataclass(frozen=True)
class Command:
    """A command line, and what must hold around it."""

    arguments: tuple[str, ...]
    result: Callable[[Path], object]
    """What a finished command left, to compare."""


def build(folder: Path) -> Path:
    """Compile failing_calls.c. Raises ``FileNotFoundError`` without a C compiler."""
    library = folder / "failing_calls.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def walk(library: Path, folder: Path, model: Path, every: int, errors_of_each: int = len(ERRORS)) -> dict[str, int]:
    """Let every ``every``-th call fail, in a process of its own.

    Args:
        errors_of_each: with how many of the errors the calls of each command fail; the next command begins with the
            next error.

    Returns:
        how many calls failed by command, and ``"tolerated"``: after how many of them the command finished all the same.

    Raises:
        AssertionError: with what went wrong.
    """
    arguments = [str(folder), str(model), str(every), str(errors_of_each)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.failing_calls", *arguments], cwd=SOURCE.parent.parent, text=True,
        capture_output=True, env={**os.environ, "LD_PRELOAD": str(library)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def main(folder: Path, model: Path, every: int, errors_of_each: int) -> None:
    """What the process started by ``walk`` does."""
    from k5cache.cli import app as k5cache
    from k5train.cli import app as k5train

    load_once()
    template = folder / "template"
    make_template(template, model)
    counts, problems = {"tolerated": 0}, []
    for number, (name, command) in enumerate(commands(model).items()):
        app = k5cache if name in OF_CACHES else k5train
        expected = undisturbed(folder, template, app, command)
        offset = 0
        for error in islice(cycle(ERRORS), number, number + errors_of_each):
            for at in numbers(folder, template, app, command, error, every, offset):
                offset += 1
                problem, tolerated = trial(folder, template, app, command, error, at, expected)
                counts[name] = counts.get(name, 0) + 1
                counts["tolerated"] += tolerated
                if problem:
                    problems.append(f"{name}, {errno.errorcode[error]} at call {at}: {problem}")
                    print(problems[-1], flush=True)
    print(json.dumps(counts))
    sys.exit(1 if problems else 0)


def load_once() -> None:
    """Import what the commands import, and keep the encoders once they are loaded."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    from k5cache.encoders import clip, qwen, vae

    for module, name in ((qwen, "load_tokenizer"), (qwen, "load_qwen"), (clip, "load_clip"), (vae, "load_vae")):
        setattr(module, name, functools.cache(getattr(module, name)))


def commands(model: Path) -> dict[str, Command]:
    """Every command that writes. They start in a copy of what ``make_template`` makes."""
    encode = ("encode", "images", "--model", str(model), "--device", "cpu", *MODEL_OPTIONS, "--set", "cache.shard_mb=1")
    run = ("run", "cache/first", *run_options(3))
    return {
        "encode": Command((*encode, "-o", "cache/new"), lambda root: rows(root / "cache/new")),
        "encode again": Command((*encode, "-o", "cache/images"), lambda root: rows(root / "cache/images")),
        "prompts add": Command(
            ("prompts", "add", "cache/first", "a fox", "--device", "cpu"), lambda root: rows(root / "cache/first")
        ),
        "gc": Command(("gc", "cache/old"), lambda root: rows(root / "cache/old")),
        "merge": Command(
            ("merge", "cache/first", "cache/images", "-o", "cache/merged"), lambda root: rows(root / "cache/merged")
        ),
        "run": Command((*run, "-o", "runs/new"), lambda root: files(root / "runs/new")),
        "resume": Command(("resume", "runs/first", "--set", "train.steps=3"), lambda root: files(root / "runs/first")),
        "prepare": Command(("base", "prepare", "--model", str(model)), lambda root: files(root / "home")),
        "export": Command(
            ("export", "runs/first/first.safetensors", "-o", "out/kohya.safetensors", "--model", str(model)),
            lambda root: files(root / "out"),
        ),
    }


def run_options(steps: int) -> tuple[str, ...]:
    """Steps on the CPU, with a state after each: from the third on, an older state is removed."""
    values = {
        "train.steps": steps, "train.checkpoint_every": 1, "train.base_model_precision": "no_change",
        "train.mixed_precision": "fp32", "train.device": "cpu", "train.lora.rank": 2, "train.lora.alpha": 2,
        "train.lora.targets": '["to_query", "to_value"]',
    }  # fmt: skip
    return tuple(word for key, value in values.items() for word in ("--set", f"{key}={value}"))


def make_template(template: Path, model: Path) -> None:
    """Images, a cache of them that is not up to date, one that has garbage, and a finished run."""
    import numpy as np
    from PIL import Image

    from k5cache.cli import app as k5cache
    from k5train.cli import app as k5train

    (template / "images").mkdir(parents=True)
    (template / "out").mkdir()

    def put(number: int) -> None:
        values = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(template / "images" / f"{number}.png")
        (template / "images" / f"{number}.txt").write_text(f"number {number}")

    def must(app: Callable[..., object], *arguments: str) -> None:
        done = Cli(template)(app, *arguments)
        assert done.code == 0, done.err

    encode = ("encode", "images", "--model", str(model), "--device", "cpu", *MODEL_OPTIONS, "--set", "cache.shard_mb=1")
    put(1)
    put(2)
    must(k5cache, *encode, "-o", "cache/first")
    must(k5cache, *encode, "-o", "cache/images")
    must(k5cache, *encode, "-o", "cache/old")
    must(k5train, "run", "cache/first", *run_options(2), "-o", "runs/first")
    (template / "images" / "1.png").unlink()
    put(3)
    must(k5cache, *encode, "-o", "cache/old")


def undisturbed(folder: Path, template: Path, app: Callable[..., object], command: Command) -> object:
    """The result without a failing call."""
    with copied(folder, template) as root:
        done = in_child(root, app, command, None)
        assert done.code == 0, done.err
        return command.result(root)


def numbers(
    folder: Path, template: Path, app: Callable[..., object], command: Command, error: int, every: int, offset: int
) -> range:
    """The calls to let fail: of all that can fail with ``error``, every ``every``-th, from another one each time."""
    with copied(folder, template) as root:
        done = in_child(root, app, command, (error, -1))
        return range(offset % every, int(done.out), every)


def trial(
    folder: Path, template: Path, app: Callable[..., object], command: Command, error: int, at: int, expected: object
) -> tuple[str, bool]:
    """Let one call fail, then run the command again. Returns what is wrong, or "", and whether the failure was
    tolerated."""
    with copied(folder, template) as root:
        failed = in_child(root, app, command, (error, at))
        if failed.code not in (0, 2) or "Traceback" in failed.err:
            return f"exit code {failed.code}: {failed.err[-600:]}", False
        names = [path.name for path in (root, *root.iterdir(), root / "home")]
        if failed.code == 2 and not any(f"{name}/" in failed.err or f" {name}\n" in failed.err for name in names):
            return f"no path: {failed.err[-300:]}\n{failed.out[-1500:]}", False
        again = in_child(root, app, command, None)
        is_done = again.code == 2 and ("already" in again.err or "is finished" in again.err)  # it failed after its end
        if again.code != 0 and not is_done:
            return f"the command does not go on: {failed.err[-300:]} then {again.err[-1000:]}", False
        if command.result(root) != expected:
            return f"another result than without the failure: {failed.err[-300:]}", False
        return "", failed.code == 0


class copied:  # noqa: N801 (a context manager)
    """A copy of the template, and K5_HOME in it."""

    def __init__(self, folder: Path, template: Path) -> None:
        self._root, self._template = folder / "trial", template

    def __enter__(self) -> Path:
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(self._template, self._root, symlinks=True)
        os.environ["K5_HOME"] = str(self._root / "home")
        return self._root

    def __exit__(self, *_: object) -> None:
        pass


def in_child(root: Path, app: Callable[..., object], command: Command, fails: tuple[int, int] | None) -> Done:
    """Run a command in a forked process.

    Args:
        fails: the error, and the number of the call that fails with it, or -1 to have the number of calls as stdout.
    """
    library = ctypes.CDLL(None)
    report = root.parent / "report.json"
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return Done(**json.loads(report.read_text())) if report.exists() else Done(code, "", "the process has died")
    try:
        if fails:
            library.fail_calls(str(root).encode(), ctypes.c_long(fails[1]), fails[0], int(fails[0] in STAYS))
        traces: list[str] = []
        sentence = disk_errors.sentence
        disk_errors.sentence = lambda e: (traces.extend(traceback.format_exception(e)), sentence(e))[1]
        try:
            done = Cli(root)(app, *command.arguments)
            done = replace(done, out=done.out + "".join(traces))  # for whoever has to find the call
        except BaseException:
            done = Done(1, "", traceback.format_exc())
        library.fail_calls(b"", ctypes.c_long(-1), 0, 0) if not fails or fails[1] >= 0 else None
        out = str(library.calls()) if fails and fails[1] < 0 else done.out
        report.write_text(json.dumps({"code": done.code, "out": out, "err": done.err}))
    finally:
        os._exit(0)


def rows(root: Path) -> dict[str, bytes]:
    """The bits of all that a trainer reads of a cache that ``verify`` finds whole."""
    from k5cache.store.reader import open_cache
    from k5cache.upkeep.verify import verify_cache
    from tests.crash_trials import rows_of

    assert verify_cache(root).problems == ()
    assert not list(root.rglob(".tmp-*"))
    tensors = rows_of(open_cache(root)).items()
    return {name: b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in row) for name, row in tensors}


def files(folder: Path) -> dict[str, bytes]:
    """The tensors of every file under a folder, and that nothing of ours is left half written there."""
    assert not [path for path in folder.rglob(".*") if path.name != ".lock" and not is_empty(path)]
    paths = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
    assert paths
    tensors = {f"{path.relative_to(folder)} {name}": t for path in paths for name, t in load_file(path).items()}
    return {name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def is_empty(path: Path) -> bool:
    """Whether it is a folder with nothing in it: one that the disk refused to remove stays until the next write."""
    return path.is_dir() and not any(path.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
