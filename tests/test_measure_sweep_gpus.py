"""Does ``pipelines.measure.sweep_gpus`` compare what it says, and does it name a command that failed?"""

from __future__ import annotations

import pytest

from k5cache.shared.errors import RunError
from k5cache.shared.sealed import write_sealed
from pipelines.measure.sweep_gpus import Timed, run, seconds_of, table_rows


def test_a_sweep_is_compared_with_that_on_one_gpu_with_its_start_and_without():
    timed = [Timed(1, 440.0, (100.0,) * 4), Timed(2, 242.0, (100.0, 100.0, 102.0, 102.0))]
    assert table_rows(timed) == [["1", "440", "1.00", "100.0", "1.00"], ["2", "242", "1.82", "101.0", "1.98"]]


def test_a_run_tells_its_seconds_and_a_command_that_fails_its_last_lines(tmp_path):
    write_sealed(tmp_path / "result.json", {"seconds": 12.5})
    assert seconds_of(tmp_path / "result.json") == 12.5
    with pytest.raises(RunError, match=r"k5train sweep: exit code 2: .*A sweep needs a grid or a list"):
        run(tmp_path, "sweep", str(tmp_path))
