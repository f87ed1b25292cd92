"""The checkpoint of random weights that starts are timed with is one that a run takes."""

from __future__ import annotations

import subprocess
import sys
import time

from k5cache.shared.checkpoint import model_folder as opened
from k5cache.shared.model import ModelConfig
from k5train.base.architecture import FULL_SIZE
from pipelines.measure import command_line, stacks
from pipelines.measure.on_gpu import ROOT
from pipelines.measure.random_inputs import model_folder


def test_a_run_takes_the_checkpoint_of_random_weights(tmp_path):
    folder = model_folder(tmp_path / "model", FULL_SIZE)
    assert opened(ModelConfig(path=str(folder)), ("transformer", "vae")) == folder


def test_processes_keep_bytecode_also_where_python_is_told_to_keep_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    told = command_line.environment(tmp_path)
    assert "PYTHONDONTWRITEBYTECODE" not in told
    assert told["PYTHONPYCACHEPREFIX"] == str(tmp_path / "bytecode")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    assert "PYTHONPYCACHEPREFIX" not in command_line.environment(tmp_path)


def test_a_process_is_watched_until_it_is_killed_and_its_time_adds_up(tmp_path):
    path = tmp_path / "stacks"
    program = (
        "import sys, time; from pathlib import Path; from pipelines.measure.stacks import sample;"
        "sample(Path(sys.argv[1])); from k5cache.shared import console;"
        "console.time = time; exec('def f(): time.sleep(600)', vars(console)); console.f()"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    while not path.is_file() or path.read_text().count("console:f") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = [line for line in path.read_text().splitlines() if line.rpartition("\t")[2]]
    assert lines[-1].endswith("\tk5cache.shared.console:f")
    places = dict(stacks.longest(path.read_text().splitlines()[:-1], 100))
    assert places["k5cache.shared.console:f"] > 0


def test_the_innermost_places_are_summed_up():
    lines = ["0.04\t", "0.07\ta:f b:g", "0.09\ta:f", "0.19\ta:f b:g", "0.22\tb:g"]
    assert [(p, round(s, 2)) for p, s in stacks.longest(lines, 2)] == [("b:g", 0.16), ("other", 0.04)]
