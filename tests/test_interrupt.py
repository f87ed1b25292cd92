"""Ctrl-C and SIGTERM: what is done is kept, one line says how to go on, and the command ends with 130."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
import weakref
from pathlib import Path

import pytest
import typer

from k5cache.cli import app as cache_app
from k5cache.encode.image_pass import Vae
from k5cache.shared import console, interrupt
from k5cache.store.manifest import read_manifest
from k5cache.store.shards import ShardWriter
from k5cache.upkeep.verify import verify_cache
from k5train.cli import app
from k5train.training import loop
from tests.cli import Cli, Done
from tests.crash_trials import in_child
from tests.workshop import Workshop


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def stopped_in_a_process(folder: Path, patch: pytest.MonkeyPatch, *arguments: str) -> Done:
    """Run k5cache in a forked process, whose signals are its own."""

    def work() -> None:
        done = Cli(folder)(cache_app, *arguments)
        (folder / "done.json").write_text(json.dumps(vars(done)), encoding="utf-8")

    assert in_child(work).wait() == 0
    patch.undo()
    return Done(**json.loads((folder / "done.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_sent_again", [False, True])
def test_an_encode_that_is_stopped_keeps_its_images_and_a_second_signal_does_not_wait(
    tmp_path, toy_model, monkeypatch, number, is_sent_again
):
    shop = Workshop(tmp_path, toy_model)
    for i in range(6):
        shop.put(f"{i}.png", f"number {i}", seed=i)
    calls, moments, finish = [], Vae.moments, ShardWriter.finish

    def stop_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            send(number)
        return moments(*arguments)

    def stop_again(writer):
        if writer.kind == "latents":
            send(number)
        return finish(writer)

    monkeypatch.setattr(Vae, "moments", stop_at_the_fourth)
    if is_sent_again:
        monkeypatch.setattr(ShardWriter, "finish", stop_again)
    arguments = ("encode", "images", "-o", "cache", "--model", str(toy_model), "--device", "cpu")
    done = stopped_in_a_process(tmp_path, monkeypatch, *arguments, "--set", "cache.resolution=64")
    assert done.code == 130
    last = done.err.splitlines()[-1]
    assert last.startswith("Stopped. What is encoded is kept in cache. To go on, run the same command: ")
    assert last.endswith(f"{shlex.join(arguments)} --set cache.resolution=64")
    num_kept = 0 if is_sent_again else 3
    assert sum(s.num_rows for s in read_manifest(shop.root).shards if s.kind == "latents") == num_kept
    assert not list(shop.root.rglob(".tmp-*"))
    report = shop.encode()
    assert (report.num_latents, report.num_texts) == (6 - num_kept, 0)
    assert verify_cache(shop.root).problems == ()


def test_a_sweep_that_is_stopped_advises_the_same_sweep(tmp_path, toy_cache, toy_model, monkeypatch):
    original = loop.Loop.step

    def stopped_after_one(self, *arguments):
        if self.progress.step == 1:
            send(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "step", stopped_after_one)
    arguments = (
        "sweep", str(toy_cache("fp32")), "--model", str(toy_model), "--grid", "train.lora.rank=2,4", "-o", "my sweep",
        *("--set", "train.mixed_precision=fp32"), *("--set", "train.steps=3"), *("--set", "train.device=cpu"),
    )  # fmt: skip
    done = Cli(tmp_path)(app, *arguments)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "Stopped and saved at step 1. The finished runs are kept. To go on, run the same command: "
        f"command {shlex.join(arguments)}"
    )
    monkeypatch.undo()
    assert Cli(tmp_path)(app, *arguments).code == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "Stopped"),
        (KeyboardInterrupt("Stopped [here]"), "Stopped [here]"),
        (typer.Abort(), "Stopped"),  # Ctrl-C at a prompt
    ],
)
def test_any_other_command_that_is_stopped_ends_with_one_line(tmp_path, error, line):
    program = typer.Typer(cls=console.Commands)
    program.add_typer(inner := typer.Typer(), name="prompts")

    @inner.command()
    def add() -> None:
        raise error

    @inner.command()
    def other() -> None: ...

    done = Cli(tmp_path)(program, "prompts", "add")
    assert (done.code, done.out, done.err) == (130, "", f"{line}\n")


def test_an_interrupt_that_python_drops_in_a_finalizer_comes_again():
    class Owner: ...

    def work() -> None:
        owner = Owner()
        callbacks.append(weakref.ref(owner, lambda _: send(signal.SIGTERM)))  # an exception in it is only printed
        with interrupt.installed():
            del owner
            time.sleep(5)

    callbacks = []
    with pytest.raises(KeyboardInterrupt):
        work()
    assert callbacks[0]() is None


def test_what_is_said_first_stays():
    with pytest.raises(KeyboardInterrupt, match="inner"), interrupt.saying("outer"), interrupt.saying("inner"):
        raise KeyboardInterrupt
