"""States and LoRAs that are written while steps go on, as on a GPU: they are of their own step, and errors are told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from k5cache.shared import console
from k5train.options.optimizer import OptimConfig
from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state, save_state
from k5train.runs.written import check_recorded
from k5train.training import loop
from k5train.training.beside import Beside
from tests.runs import CONFIG, go_on, lora_of, metrics_of, numbers, same, start_run, state_of

STEPS = replace(CONFIG, steps=6, checkpoint_every=2)
FREE = replace(
    STEPS,
    lora=replace(CONFIG.lora, dropout=0.0),
    optim=OptimConfig(optimizer="schedulefree", lr=1e-2, warmup_steps=0, lr_scheduler="constant"),
)


@pytest.fixture
def beside(monkeypatch) -> None:
    """Runs write beside their steps, also on a CPU."""
    monkeypatch.setattr(loop, "Beside", lambda is_on: Beside(True))


def files_of(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the LoRAs, which are as the run recorded them, and of the states."""
    files = sorted(root.rglob("*.safetensors"))
    assert all(check_recorded(path) for path in files if "state" not in path.parts)
    return {f"{path.relative_to(root)}/{key}": t for path in files for key, t in load_file(path).items()}


@pytest.mark.parametrize("config", [STEPS, FREE], ids=["average", "schedule-free"])
def test_what_is_written_beside_later_steps_is_of_its_own_step(tmp_path, toy_cache, toy_model, monkeypatch, config):
    config = replace(config, steps=4)  # both states stay
    start_run(tmp_path / "a" / "run", toy_cache("fp32"), toy_model, config)
    went_on, accumulate, threads = Event(), loop.accumulate, []

    def trained(*args: Any, **kwargs: Any) -> Any:
        losses = accumulate(*args, **kwargs)
        if len(metrics_of(tmp_path / "b" / "run")) == 3:  # two steps after the state of step 2 was due
            went_on.set()
        return losses

    def late(*args: Any) -> Path:
        threads.append(current_thread())
        assert len(threads) > 1 or went_on.wait(60)
        return save_state(*args)

    monkeypatch.setattr(loop, "Beside", lambda is_on: Beside(True))
    monkeypatch.setattr(loop, "accumulate", trained)
    monkeypatch.setattr(loop, "save_state", late)
    start_run(tmp_path / "b" / "run", toy_cache("fp32"), toy_model, config)
    assert [thread is main_thread() for thread in threads] == [False, True]
    assert same(files_of(tmp_path / "b" / "run"), files_of(tmp_path / "a" / "run"))
    assert numbers(metrics_of(tmp_path / "b" / "run")) == numbers(metrics_of(tmp_path / "a" / "run"))


def test_a_full_disk_ends_the_run_a_step_later_and_the_state_before_it_stays(
    tmp_path, toy_cache, toy_model, monkeypatch, beside
):
    root, calls = tmp_path / "run", []

    def full(*args: Any) -> Path:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "state")
        return save_state(*args)

    monkeypatch.setattr(loop, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        start_run(root, toy_cache("fp32"), toy_model, STEPS)
    saved = latest_state(Run(root).state)
    assert saved is not None
    assert saved.progress.step == 2
    assert not (root / "result.json").exists()
    monkeypatch.undo()
    go_on(root)
    start_run(tmp_path / "whole" / "run", toy_cache("fp32"), toy_model, STEPS)
    assert same(lora_of(root), lora_of(tmp_path / "whole" / "run"))


def test_a_state_that_could_not_be_written_does_not_keep_ctrl_c_from_saving_a_later_one(
    tmp_path, toy_cache, toy_model, monkeypatch, beside
):
    stopped, failed, accumulate = Event(), Event(), loop.accumulate

    def full_until_then(*args: Any) -> Path:
        if current_thread() is not main_thread():
            assert stopped.wait(60)
            failed.set()
            raise OSError(28, "No space left on device", "state")
        return save_state(*args)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(metrics_of(tmp_path / "run")) == 3:
            stopped.set()
            raise KeyboardInterrupt
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(loop, "save_state", full_until_then)
    monkeypatch.setattr(loop, "accumulate", stopping)
    with pytest.raises(KeyboardInterrupt, match="saved at step 3"):
        start_run(tmp_path / "run", toy_cache("fp32"), toy_model, STEPS)
    assert failed.is_set()


def test_an_error_of_a_step_lets_the_state_that_is_being_written_be_finished(
    tmp_path, toy_cache, toy_model, monkeypatch, beside
):
    began, accumulate = Event(), loop.accumulate

    def slow(*args: Any) -> Path:
        began.set()
        time.sleep(0.3)
        return save_state(*args)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if began.is_set():
            raise RuntimeError("not finite")
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(loop, "save_state", slow)
    monkeypatch.setattr(loop, "accumulate", failing)
    with pytest.raises(RuntimeError, match="not finite"):
        start_run(tmp_path / "run", toy_cache("fp32"), toy_model, STEPS)
    assert (Run(tmp_path / "run").state / "step-000002" / "step.json").is_file()
    assert load_file(Run(tmp_path / "run").checkpoint(2))


def test_ctrl_c_waits_for_the_state_that_is_being_written_and_the_run_goes_on_bit_for_bit(
    tmp_path, toy_cache, toy_model, monkeypatch, beside
):
    began, accumulate = Event(), loop.accumulate

    def slow(*args: Any) -> Path:
        if current_thread() is not main_thread():
            began.set()
            time.sleep(0.3)
        return save_state(*args)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if began.is_set():
            raise KeyboardInterrupt
        return accumulate(*args, **kwargs)

    root = tmp_path / "run"
    monkeypatch.setattr(loop, "save_state", slow)
    monkeypatch.setattr(loop, "accumulate", stopping)
    with pytest.raises(KeyboardInterrupt, match="saved at step"):
        start_run(root, toy_cache("fp32"), toy_model, STEPS)
    assert (Run(root).state / "step-000002" / "step.json").is_file()
    monkeypatch.undo()
    go_on(root)
    start_run(tmp_path / "whole" / "run", toy_cache("fp32"), toy_model, STEPS)
    assert same(state_of(root), state_of(tmp_path / "whole" / "run"))
    assert numbers(metrics_of(root)) == numbers(metrics_of(tmp_path / "whole" / "run"))


@pytest.mark.parametrize("work", ["threading.Event().wait", "write"])
def test_a_process_that_ends_does_not_wait_for_work_that_nobody_waits_for(tmp_path, work):
    program = f"""if True:
        import threading, time, torch
        from safetensors.torch import save_file
        from k5train.training.beside import Beside
        def write():
            while True:
                save_file({{"a": torch.zeros(1 << 20)}}, {str(tmp_path / "file")!r})
        Beside(True).begin({work})
        time.sleep(0.2)
        print("said")
        raise KeyboardInterrupt
    """
    env = {**os.environ, "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, capture_output=True, env=env)
    assert (done.returncode, done.stdout.split()) == (console.STOPPED, [b"said"])
    assert b"KeyboardInterrupt" in done.stderr
    assert b"FATAL" not in done.stderr


def test_a_run_that_is_moved_while_its_state_is_written_gets_no_second_folder(
    tmp_path, toy_cache, toy_model, monkeypatch, beside
):
    root, moved = tmp_path / "run", tmp_path / "moved"

    def moving(*args: Any) -> Path:
        state = save_state(*args)
        root.rename(moved)
        return state

    monkeypatch.setattr(loop, "save_state", moving)
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        start_run(root, toy_cache("fp32"), toy_model, STEPS)
    assert not root.exists()
    assert (moved / "state" / "step-000002" / "step.json").is_file()


def test_nothing_is_copied_before_the_earlier_copy_is_written(tmp_path, toy_cache, toy_model, monkeypatch, beside):
    done, copy_state = Event(), loop.Loop.copy_state

    def slow(*args: Any) -> Path:
        time.sleep(0.3)
        state = save_state(*args)
        done.set()
        return state

    def copying(self: loop.Loop, *args: Any) -> Any:
        assert self.progress.step == 1 or done.is_set()
        done.clear()
        return copy_state(self, *args)

    monkeypatch.setattr(loop, "save_state", slow)
    monkeypatch.setattr(loop.Loop, "copy_state", copying)
    start_run(tmp_path / "run", toy_cache("fp32"), toy_model, replace(STEPS, steps=3, checkpoint_every=1))


@pytest.mark.parametrize(("times", "is_main"), [(10, True), (11, False)])
def test_steps_wait_where_host_memory_has_no_room_for_two_copies_of_all(
    tmp_path, toy_cache, toy_model, monkeypatch, beside, times, is_main
):
    threads: list[bool] = []

    def noted(*args: Any) -> Path:
        threads.append(current_thread() is main_thread())
        return save_state(*args)

    run = tmp_path / "run"
    monkeypatch.setattr(loop, "save_state", noted)
    monkeypatch.setattr("k5train.training.beside.free_ram", lambda: times * 49_152)
    start_run(run, toy_cache("fp32"), toy_model, replace(STEPS, steps=3))
    assert sum(t.nbytes for t in lora_of(run).values()) == 49_152
    assert threads == [is_main, True]


def test_work_is_done_in_its_order_and_its_error_raised_once():
    done: list[int] = []
    beside = Beside(True)
    for number in range(5):
        beside.begin(partial(done.append, number))
    beside.wait()
    assert done == list(range(5))
    beside.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beside.begin(partial(done.append, 9))
    beside.check()
    assert done == list(range(5))
