"""The checkpoint of random weights that starts are timed with is one that a run takes."""

from __future__ import annotations

from k5cache.shared.checkpoint import model_folder as opened
from k5cache.shared.model import ModelConfig
from k5train.base.architecture import FULL_SIZE
from pipelines.measure import command_line
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
