"""Ctrl-C and SIGTERM: what is done is kept, one line says how to go on, and the command ends with 130."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import sys
import time
import tomllib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from k5cache.cli import app as cache_app
from k5cache.encode.image_pass import Vae
from k5cache.shared import console, interrupt
from k5cache.store.manifest import read_manifest
from k5cache.store.shards import ShardWriter
from k5cache.upkeep.verify import verify_cache
from k5train.cli import app
from k5train.commands.sample import sample
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import ValidationConfig
from k5train.runs.folder import Run
from k5train.training import carry_out, loop
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.session import Session
from tests.cli import Cli, Done
from tests.crash_trials import in_child
from tests.runs import CONFIG, go_on, metrics_of, numbers, same, start_run, state_of
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


@pytest.mark.long
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


MEASURED = replace(
    CONFIG,
    steps=4,
    lora=replace(CONFIG.lora, dropout=0.0),
    optim=OptimConfig(optimizer="schedulefree", lr=1e-2, warmup_steps=0, lr_scheduler="constant"),
    validation=ValidationConfig(split=0.4, held_out_every=2, held_out_sigmas=1),
)


def at_call(number: int, function: Callable[..., Any], *signals: int) -> Callable[..., Any]:
    """The function, which sends itself signals at the end of one of its calls."""
    calls: list[int] = []

    def stopping(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        calls.append(1)
        if len(calls) == number:
            for each in signals:
                send(each)
        return result

    return stopping


@pytest.fixture(scope="module")
def measured(tmp_path_factory, toy_cache, toy_model) -> Path:
    """Four steps without a break, whose optimizer puts its average in the place of the parameters to measure."""
    root = tmp_path_factory.mktemp("measured") / "run"
    start_run(root, toy_cache("fp32"), toy_model, MEASURED)
    return root


@pytest.mark.parametrize(
    ("owner", "name", "number", "signals", "said"),
    [
        # On the held-out rows and on the probe at step 0, then again at step 2.
        (HeldOutLoss, "measure", 4, [signal.SIGINT], "Stopped and saved at step 2. "),
        (Session, "update", 3, [signal.SIGINT], "Stopped and saved at step 3. "),
        # The second signal does not wait for the end of the update, which is then neither of step 2 nor of step 3.
        (Session, "update", 3, [signal.SIGINT, signal.SIGTERM], "Stopped in the middle of step 3, which is not saved."),
        # The LoRA of a lowest loss: it is written and counted, then the run stops. It is not measured again.
        (loop.Loop, "save_lora", 1, [signal.SIGINT], "Stopped and saved at step 2. "),
    ],
    ids=["while measuring", "in an update", "twice in an update", "while the best is saved"],
)
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bits_and_metrics(
    tmp_path, toy_cache, toy_model, monkeypatch, measured, owner, name, number, signals, said
):
    root = tmp_path / "run"
    monkeypatch.setattr(owner, name, at_call(number, getattr(owner, name), *signals))
    with pytest.raises(KeyboardInterrupt) as stopped:
        start_run(root, toy_cache("fp32"), toy_model, MEASURED)
    assert str(stopped.value).startswith(said)
    monkeypatch.undo()
    go_on(root)
    assert same(state_of(root), state_of(measured))
    assert numbers(metrics_of(root)) == numbers(metrics_of(measured))


def test_a_signal_while_a_stopped_run_is_saved_waits_and_what_is_said_stays(
    tmp_path, toy_cache, toy_model, monkeypatch
):
    monkeypatch.setattr(loop.Loop, "step", at_call(1, loop.Loop.step, signal.SIGINT))
    monkeypatch.setattr(loop, "save_state", at_call(1, loop.save_state, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match=r"^Stopped and saved at step 1\. Go on with: k5train resume"):
        start_run(tmp_path / "run", toy_cache("fp32"), toy_model, CONFIG)


def test_a_run_that_is_stopped_after_its_last_step_does_not_say_that_training_never_began(
    tmp_path, toy_cache, toy_model, monkeypatch
):
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(carry_out, "compare_saved", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"^Stopped after the last step\. .* k5train check-lora .*safetensors"):
        start_run(tmp_path / "run", toy_cache("fp32"), toy_model, replace(CONFIG, steps=1))
    assert Run(tmp_path / "run").is_finished


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


def test_all_signals_to_a_process_that_is_also_told_are_one_and_a_second_is_told():
    def work() -> None:
        with interrupt.installed(), interrupt.counted_once():
            try:
                send(signal.SIGTERM)
                pytest.fail("the first one is answered")
            except KeyboardInterrupt:
                send(signal.SIGINT)  # the same word once more
                send(signal.SIGTERM)
                done.append("saved")
            with interrupt.deferred():
                interrupt.hurry()
                done.append("waited")

    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["saved"]


def test_signals_that_are_counted_interrupt_nothing():
    with interrupt.installed():
        with interrupt.counted() as count:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert count() == 2
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_is_said_first_stays():
    with pytest.raises(KeyboardInterrupt, match="inner"), interrupt.saying("outer"), interrupt.saying("inner"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("package", ["k5cache", "k5train"])
def test_a_signal_during_the_imports_of_a_command_line_is_answered(package, monkeypatch, capsys):
    class Interrupted:
        @property
        def main(self):
            raise KeyboardInterrupt

    main = importlib.import_module(f"{package}.__main__").main
    monkeypatch.setitem(sys.modules, f"{package}.cli", Interrupted())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped before the command began: nothing was done\n"


def test_both_commands_begin_where_ctrl_c_is_answered():
    document = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert document["project"]["scripts"] == {"k5cache": "k5cache.__main__:main", "k5train": "k5train.__main__:main"}


def test_a_signal_during_the_imports_of_sample_says_that_no_picture_was_written(monkeypatch, tmp_path):
    class Interrupted:
        @property
        def open_run(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "k5train.runs.folder", Interrupted())
    with pytest.raises(KeyboardInterrupt, match="Stopped: no picture was written"):
        sample(tmp_path)
