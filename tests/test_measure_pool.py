"""Are jobs done in processes of one thread, and those alone whose results are not in the file yet?"""

from __future__ import annotations

import json
import os

import pytest

from k5cache.shared.errors import OutputError
from pipelines.measure import pool


def job(number, folder):
    """Leave a file that says how many threads the job may use, and in its name which process did it."""
    (folder / f"{number}-{os.getpid()}").write_text(os.environ["OMP_NUM_THREADS"], encoding="utf-8")
    return number * number


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_whose_results_are_in_the_file_are_not_done_again(tmp_path, workers, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3" if workers > 1 else "1")
    file, setting = tmp_path / "results.json", {"steps": (4, 5)}
    jobs = {"job 3": (3, tmp_path)}
    assert pool.do_all(job, jobs, file, setting) == {"job 3": 9}
    lines: list[str] = []
    jobs |= {"job 4": (4, tmp_path)}
    assert pool.do_all(job, jobs, file, setting, workers, lines.append) == {"job 3": 9, "job 4": 16}
    assert lines == ["job 4: 2 of 2 done"]
    (of_4,) = tmp_path.glob("4-*")
    assert of_4.read_text(encoding="utf-8") == "1"
    assert (of_4.name == f"4-{os.getpid()}") == (workers == 1)
    assert len([*tmp_path.glob("3-*")]) == 1
    with pytest.raises(OutputError, match="not from this trial with this setting"):
        pool.do_all(job, jobs, file, {"steps": (4, 6)}, workers)
    assert json.loads(file.read_text(encoding="utf-8"))["results"] == {"job 3": 9, "job 4": 16}
