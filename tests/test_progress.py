"""Long work where there is no terminal: a line a minute says what is being done and how far it is."""

from __future__ import annotations

import io
import json
import os
import time
from threading import Event

import pytest

from k5cache.shared import console, progress, progress_file
from k5cache.shared.foreign import Terminal
from k5cache.shared.progress import Bars, Lines, doing
from k5cache.shared.units import count_of


@pytest.fixture
def clock(monkeypatch):
    """The time, which only passes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_the_count_the_rate_of_the_last_minute_and_the_time_left(clock):
    lines = Lines(print)
    lines.get_time = progress.time.monotonic
    task = lines.add_task("training cats", total=2000, completed=500, unit="step", note="")
    clock[0] += 60
    assert lines.line() == "training cats: 500 of 2,000 steps, for 1 min 0 s"
    lines.update(task, advance=120, note="loss 0.1234")
    clock[0] += 60
    assert lines.line() == "training cats: 620 of 2,000 steps, 2.0 step/s, 11 min 30 s left, loss 0.1234"
    lines.update(task, advance=20)
    clock[0] += 60
    with doing(lines, "held-out loss"):
        assert lines.line() == (
            "training cats: 640 of 2,000 steps, 3.0 s/step, 1 h 8 min left, loss 0.1234; held-out loss: for 0.0 s"
        )
    lines.update(task, completed=2000)
    assert lines.line() == ""


def test_bytes_are_written_as_bytes_and_a_count_without_an_end_has_no_time_left(clock):
    lines = Lines(print)
    lines.get_time = progress.time.monotonic
    task = lines.add_task("verifying", total=None, unit="byte", note="")
    lines.advance(task, 3 * 2**30)
    clock[0] += 60
    assert lines.line() == "verifying: 3.0 GiB, 51.2 MiB/s"


def test_lines_are_printed_while_work_goes_on_and_not_after_it():
    said: list[str] = []
    twice = Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            twice.set()

    with Lines(say, seconds=0.01) as lines, doing(lines, "deleting what nothing names"):
        assert twice.wait(10)
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count
    assert said[0].startswith("deleting what nothing names: for ")


def test_a_terminal_has_bars_and_anything_else_has_lines(monkeypatch):
    assert progress.SECONDS_A_LINE == 60
    for term, is_terminal, kind in (("xterm", True, Bars), ("dumb", True, Lines), ("xterm", False, Lines)):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(console, "err", Terminal(force_terminal=is_terminal, file=io.StringIO()))
        assert type(console.progress()) is kind


def test_a_pipe_reads_a_line_of_every_long_work(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "err", Terminal(file=file))
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.01)
    with console.working("quantising the transformer"):
        time.sleep(0.05)
    assert file.getvalue().startswith("quantising the transformer: for ")


def test_a_page_reads_the_same_tasks_from_a_file_that_is_whole_at_any_time(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv(progress_file.VARIABLE, str(path))
    monkeypatch.setattr(progress_file._Of, "reporter", None)
    monkeypatch.setattr(progress_file, "SECONDS", 0.01)
    inherited: list[bool] = []
    with pytest.raises(SystemExit):  # what a command starts reports nothing, whether it has drawn a bar or not
        console.run(lambda: inherited.append(progress_file.VARIABLE in os.environ))
    assert inherited == [False]
    with Lines(print) as lines:
        report = progress_file.reporter()
        task = lines.add_task("training <b>", total=20, completed=5, unit="step", note="loss 0.1")
        with doing(lines, "held-out loss"):
            report.write()
            first, second = json.loads(path.read_text())["tasks"]
        assert first == {
            "name": "training <b>", "completed": 5, "total": 20, "unit": "step", "note": "loss 0.1",
            "per_second": None, "seconds_left": None,
        }  # fmt: skip
        assert (second["name"], second["total"]) == ("held-out loss", None)
        lines.update(task, completed=20)
        report.write()
        assert json.loads(path.read_text()) == {"tasks": []}
    with Lines(print) as lines:  # the next phase of the same command
        lines.add_task("sampling", total=2, unit="picture", note="")
        until = time.monotonic() + 10
        while not json.loads(path.read_text())["tasks"] and time.monotonic() < until:
            time.sleep(0.01)
        assert json.loads(path.read_text())["tasks"][0]["name"] == "sampling"
        path.unlink()
        path.mkdir()  # a disk that refuses stops no work
        lines.add_task("more", total=2, unit="", note="")
        report.write()
    monkeypatch.setattr(progress_file._Of, "pid", -1)  # as in a process that this one forked
    assert progress_file.reporter() is None


def test_one_of_a_thing_has_no_s():
    assert [count_of(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
    assert [count_of(n, "image has", "images have") for n in (1, 2)] == ["1 image has", "2 images have"]
    told = [progress.counted(*words) for words in ((0, 1, "step"), (1, None, "image"), (3, 1200, "step"), (1, 2, ""))]
    assert told == ["0 of 1 step", "1 image", "3 of 1,200 steps", "1 of 2"]
