"""Do the trials of ``pipelines.measure.trust`` notice what they look for, and is each of them counted?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.measure.trust import __main__ as command
from pipelines.measure.trust import flips, kills, trial, workers
from pipelines.measure.trust.trial import Place, Trial, Wrong
from tests.cli import Cli, Done

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path, toy_model) -> Place:
    (tmp_path / "template").mkdir()
    (tmp_path / "scratch").mkdir()
    return Place(toy_model, tmp_path / "template", tmp_path / "scratch")


def test_a_flip_that_is_not_noticed_is_silent_and_an_error_that_names_nothing_no_sentence(
    place, toy_cache, monkeypatch
):
    shutil.copytree(toy_cache("fp32"), place.template / "cache" / "whole")
    case = flips.cases(flips.CACHES)["text"]
    ended = []
    monkeypatch.setattr(flips, "cases", lambda row: {"text": flips.Case(case.pattern, case.problem, end)})

    def end(where: Place, root: Path, path: Path, expected: dict) -> None:
        ended.append(path)
        path.unlink()

    text = Trial(flips.CACHES, "text", seed=1, count=8)
    flips.flips(place, text, {})
    assert len(ended) == 1
    for said, verdict in ((None, "silent"), ("something is wrong", "traceback"), (KeyError("x"), "traceback")):
        answers = iter([None, said])  # before the flip, and after it

        def problem(root: Path, path: Path, answers=answers) -> str | None:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(flips, "cases", lambda row, p=problem: {"text": flips.Case(case.pattern, p, end)})
        with pytest.raises(Wrong) as wrong:
            flips.flips(place, text, {})
        assert wrong.value.verdict == verdict


def test_a_command_must_name_the_damaged_file(tmp_path, monkeypatch):
    def refused(done: Done) -> str:
        monkeypatch.setattr(flips, "run", lambda *args: done)
        return flips._refused(tmp_path, tmp_path / "x.json", "k5train", "resume")

    for done, verdict in ((Done(0, "", ""), "silent"), (Done(2, "", "error: something"), "traceback")):
        with pytest.raises(Wrong) as wrong:
            refused(done)
        assert wrong.value.verdict == verdict
    assert refused(Done(2, "", "error: x.json")) == "error: x.json"


def test_a_command_that_breaks_is_a_traceback_and_one_that_is_killed_says_nothing(tmp_path, monkeypatch):
    def broken(self, app, *arguments):
        raise ValueError("oh")

    monkeypatch.setattr(Cli, "__call__", broken)
    with pytest.raises(Wrong, match="ValueError: oh") as wrong:
        trial.run(tmp_path, ("k5cache", "options"))
    assert wrong.value.verdict == "traceback"
    monkeypatch.setattr(Cli, "__call__", lambda *args: os._exit(7))
    with pytest.raises(Wrong, match="died with 7"):
        trial.run(tmp_path, ("k5cache", "options"))
    monkeypatch.setattr(Cli, "__call__", lambda *args: time.sleep(60))
    assert trial.run(tmp_path, ("k5cache", "options"), seconds=0.05) is None


def committed_lines(root: Path, before: int | None) -> int:
    now = len((root / "file").read_text().split()) if (root / "file").exists() else 0
    if now < (before or 0):
        raise Wrong("lost", f"{before} lines were there, and now {now}")
    return now


@pytest.mark.parametrize(
    ("lengths", "result", "verdict"),
    [((1, 2, 3, 4), "right", None), ((1, 3, 2, 4), "right", "lost"), ((1, 2, 3, 4), "wrong", "silent")],
)
def test_what_was_committed_before_a_kill_must_be_there_after_the_next_and_the_end_is_compared(
    place, monkeypatch, lengths, result, verdict
):
    left = iter(lengths)

    def run(root: Path, line: object, seconds: float | None = None) -> Done | None:
        (root / "file").write_text("line " * next(left))
        return None if seconds is not None else Done(0, "", "")

    case = kills.Case((), lambda root: {"result": result}, committed_lines, lambda *args: None)
    monkeypatch.setattr(kills, "run", run)
    monkeypatch.setattr(kills, "cases", lambda *args: {"it": case})

    def make(where: Place, one: Trial, kept: dict) -> bool:
        kills.kill(where, one, {"result": "right"}, kept)
        return False

    found = workers._one(make, Trial(kills.CACHES, "it", seed=0, count=3), place, {"it": 1.0})
    assert found.verdict == verdict, found.problem


def test_every_trial_is_made_once_counted_in_its_row_and_kept_if_it_went_wrong(place):
    trials = [Trial(row, f"case {i % 2}", i, count=i) for i, row in enumerate(command.ROWS)]

    def make(where: Place, one: Trial, kept: dict) -> bool:
        assert where.scratch.is_dir()
        if one.seed == 2:
            raise Wrong("silent", "another result")
        if one.seed == 3:
            raise KeyError("x")
        if one.seed == 4:
            os._exit(7)
        return one.seed == 5

    found = workers.make_all(make, trials, place, 3, time.monotonic() + 60, lambda line: None)
    lines = {line["row"]: line for line in command.counts_of(found)}
    assert [lines[row]["trials"] for row in command.ROWS] == [0, 1, 2, 3, 0, 5, 6]
    assert [lines[row]["tolerated"] for row in command.ROWS] == [0, 0, 0, 0, 0, 1, 0]
    written = json.loads(json.dumps(command.document(found, len(trials), 0, 1.0)))
    wrong = {one["verdict"]: Trial(**one["trial"]) for one in written["wrong"]}
    assert wrong["silent"] == trials[2]
    assert {one["trial"]["seed"] for one in written["wrong"]} >= {2, 3}
    assert any("a worker died: 7" in one["problem"] and "seed=4" in one["problem"] for one in written["wrong"])
    assert len(workers.make_all(make, trials, place, 1, time.monotonic() - 1, lambda line: None)) == len(found) - 1


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_few_trials_of_every_row_find_nothing(tmp_path):
    out = tmp_path / "trust.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pipelines.measure.trust", "--workers", "2", "--cache-kills", "12",
         "--run-kills", "14", "--flips", "1000", "--every", "400", "-o", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert all(row["trials"] and not any(row[verdict] for verdict in command.VERDICTS) for row in rows)
