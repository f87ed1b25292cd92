"""Does ``pipelines.measure.on_gpu`` keep what was measured, whatever part hangs or fails, and are its calls valid?"""

from __future__ import annotations

import importlib
import json

import pytest
import typer

from pipelines.measure import on_gpu
from pipelines.measure.on_gpu import PARTS, Part


def python(statement: str, limit: float = 60) -> Part:
    return Part(limit, ("timeit", "-n", "1", "-r", "1", statement))


def test_a_part_that_hangs_or_fails_costs_only_itself(tmp_path, monkeypatch):
    parts = {
        "first": python("open(r'{out}', 'w').write('[1]')"),
        "hangs": python("import time; time.sleep(600)", 1),
        "fails": python("1 / 0"),
        "is cut short": python("open(r'{out}', 'w').write('[')"),
        "has no numbers": python("pass"),
        "last": python("open(r'{out}', 'w').write('[3]')"),
    }
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    results = on_gpu.run_parts(list(parts), tmp_path, 600, False)
    assert json.loads((tmp_path / on_gpu.RESULTS).read_text()) == results
    assert {name: result.get("result") for name, result in results.items()} == {
        "first": [1], "hangs": None, "fails": None, "is cut short": None, "has no numbers": "passed", "last": [3]
    }  # fmt: skip
    assert [name for name, result in results.items() if "failed" in result] == ["hangs", "fails", "is cut short"]
    assert results["hangs"]["failed"].startswith("stopped after")
    assert "ZeroDivisionError" in (tmp_path / on_gpu.LOG).read_text()
    over = on_gpu.run_parts(["first"], tmp_path, -1, False)
    assert over["first"] == {"failed": "the time of the whole call was over"}


def test_every_step_is_timed_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(
        on_gpu, "PARTS", {n: Part(1 if n == "b" else 60, "eager") for n in "abc"} | {"d": python("pass")}
    )
    started: list[str] = []

    def words(name, path, is_small, inputs):
        started.append(name)
        done = f"open(r'{path}', 'w').write('{{}}')"
        return ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)" if name == "b" else done]

    monkeypatch.setattr(on_gpu, "_words", words)
    results = on_gpu.run_parts(list("abcd"), tmp_path, 600, False)
    assert started == list("abcd")
    assert [name for name, result in results.items() if "failed" in result] == ["b"]


def test_what_a_step_raises_is_its_result(monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(on_gpu, "_timed", fails)
    assert on_gpu._step("eager", True) == {"failed": "RuntimeError: CUDA error"}


def test_a_captured_case_and_one_with_routes_run_on_a_small_model():
    for name in ("quanto-8.5", "dynamic-tread"):
        result = on_gpu._step(name, True)
        assert result.get("milliseconds", 0) > 0, result


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if not part.is_step and part.has_numbers])
def test_the_other_measurements_take_these_options(name):
    module, *words = PARTS[name].what
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    context = typer.main.get_command(app).make_context(
        name, [word.format(out="numbers.json", folder="inputs") for word in words]
    )
    assert str(context.params["out"]) == "numbers.json"


def test_the_files_of_tests_are_there():
    files = [word for part in PARTS.values() if not part.is_step for word in part.what if word.endswith(".py")]
    assert len(files) == 4
    assert all((on_gpu.ROOT / name).is_file() for name in files)
