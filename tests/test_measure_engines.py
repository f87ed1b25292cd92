"""Does ``pipelines.measure.engines`` tell what it has measured at once, and of an engine that hangs, that it does?"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from k5cache.bench.measurements import Sizes
from k5cache.shared.errors import RunError
from pipelines.measure import engines
from pipelines.measure.engines import Course, Rate

EMBEDDED = Rate("embedded", 1, 512, 10.0, 0.0, 1.5, 52.0)
ON_TWO = Rate("ray", 2, 1024, 19.0, 12.25, 9.0, 63.0)


def test_what_is_measured_can_be_chosen_and_is_all_of_a_machine_otherwise():
    assert engines.engines(None, 2) == [None, 1, 2]
    assert engines.engines(None, 1) == [None, 1]
    assert engines.engines("ray-2, embedded", 2) == [2, None]
    for wrong in ("ray", "ray-0", "ray-x", "embedded-1", ""):
        with pytest.raises(RunError, match=f"--only {wrong}: .* is not an engine"):
            engines.engines(wrong, 2)


def test_each_engine_is_compared_with_the_embedded_one_if_that_was_measured():
    row = ("ray", "2", "1024", "19.00", "1.90x", "12.2", "9.0", "63.0")
    assert engines.table_rows([EMBEDDED, ON_TWO])[1] == row
    given_up = replace(ON_TWO, num_images=0, images_a_second=0.0, seconds_to_first=None)
    assert engines.table_rows([given_up]) == [("ray", "2", "0", "0.00", "-", "12.2", "-", "63.0")]


def test_each_rate_is_printed_and_written_before_the_next_and_an_engine_that_hangs_is_the_last(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "rates.json"

    def measure(model, sizes, num_images, num_gpus, device, limit):
        if num_gpus:
            assert json.loads(out.read_text())[0]["images_a_second"] == 10.0
            assert "images/s 10.00" in capsys.readouterr().err
        return (ON_TWO, True) if num_gpus else (EMBEDDED, False)

    monkeypatch.setattr(engines, "measure", measure)
    assert engines.measure_all(tmp_path, Sizes(), 512, [None, 2, 1], "cpu", 9.0, out) == [EMBEDDED, ON_TWO]
    assert [rate["num_gpus"] for rate in json.loads(out.read_text())] == [1, 2]
    assert "ray-2 was given up" in capsys.readouterr().err


def test_an_engine_without_an_answer_is_stopped_and_said_so(capfd):
    course = Course()
    with engines._watched("ray-2", course, 1024, limit=0.1):
        time.sleep(60)
    assert course.is_given_up
    printed = capfd.readouterr().err
    assert "ray-2 is given up: not started after 0 s" in " ".join(printed.split())
    assert "test_an_engine_without_an_answer" in printed, "where it waits"
    course = Course(done=[(1.0, 3)], started=time.monotonic())
    with engines._watched("ray-2", course, 1024, limit=60.0):
        assert course.words(1024) == "3 of 1024 images after 0 s"
    assert not course.is_given_up
