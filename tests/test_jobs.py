"""The queue of ``k5train ui``: jobs are ordinary processes, one a GPU, and whatever is killed, the next one begins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from k5cache.shared import system
from k5cache.shared.errors import OutputError, RunError
from k5train.ui.jobs import folder as job_files
from k5train.ui.jobs import job as job_module
from k5train.ui.jobs import processes, queue, slots, waits, worker
from k5train.ui.jobs.again import again
from k5train.ui.jobs.job import Job, gpus_of
from k5train.ui.jobs.view import queue_view
from k5train.ui.listing import NotHere
from k5train.ui.project import Project
from tests import fake_jobs

UNTIL_GONE = "import os, time\nwhile os.path.exists('go'): time.sleep(0.01)"
"""Runs until the project's file ``go`` is deleted."""
SAVES = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
    raise SystemExit(130)
"""
HANGS = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):  # who ignores Ctrl-C is sent the other one
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A project with one GPU, whose jobs run a line of Python."""
    monkeypatch.setattr(queue, "WORKER", fake_jobs.ME)
    monkeypatch.setattr(queue, "WAITER", fake_jobs.ME)
    monkeypatch.setattr(waits, "external", fake_jobs.external)
    monkeypatch.setattr(slots, "slots", fake_jobs.gpus)
    monkeypatch.setattr(worker, "SECONDS", 0.02)
    monkeypatch.setenv(fake_jobs.GPUS, "1")
    monkeypatch.setenv(fake_jobs.OTHERS, str(tmp_path / "other"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    return Project(tmp_path)


def add(project: Project, code: str, about: str = "runs/a", kind: str = "run", **extra: object) -> Job:
    return queue.add(project, ["k5train", kind, code], f"{kind} {about}", kind, about, **extra)


def until(claim: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.01)


def state(project: Project, job: Job) -> str:
    return queue.find(project, job.id).state


def states(project: Project) -> list[str]:
    return [job.state for job in reversed(queue.jobs(project))]


def test_jobs_of_one_gpu_run_one_after_another_without_the_page_and_say_how_they_ended(project, monkeypatch):
    show = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd(), sys.argv, flush=True)"
    (project.root / "go").touch()
    first = add(project, f"{show}\n{UNTIL_GONE}")
    fails = "import sys; print('error: there is no cache [b]here\\n  fix: encode it', file=sys.stderr); sys.exit(2)"
    second, third = add(project, fails, "runs/b"), add(project, "print('third')", "runs/c")
    assert states(project) == ["running", "waiting", "waiting"]
    waits = queue.waits_for(project, queue.jobs(project))
    assert waits[second.id].words == "runs/a"
    assert waits[third.id].words == "runs/a and the job before it"
    assert queue.gpu_in_use(project) == "runs/a"
    (project.root / "other").touch()
    (place,) = queue_view(project).places  # somebody starts a command on the same GPU, in a terminal
    assert place.job is not None
    assert place.job.id == first.id
    assert place.others == ("k5train sample runs/a (process 7)",)
    assert queue.gpu_in_use(project) == "runs/a"
    (project.root / "other").unlink()
    add(project, "print('checked')", kind="verify")  # needs no GPU, so it does not wait
    until(lambda: states(project)[3] == "finished")
    (project.root / "go").unlink()
    until(lambda: states(project) == ["finished", "failed", "finished", "finished"])  # nothing here has called advance
    done = [queue.find(project, job.id) for job in (first, second, third)]
    assert [job.exit_code for job in done] == [0, 2, 0]
    assert [job.gpu for job in done] == ["GPU 0"] * 3
    assert queue.tail(done[0]) == f"GPU-0abc {project.root} ['-c']\n"
    assert queue.error_of(done[1]) == ("there is no cache [b]here", "encode it")
    assert queue.error_of(done[0]) is None
    assert all(job.seconds is not None and 0 <= job.seconds < 20 for job in done)
    assert queue.gpu_in_use(project) is None
    assert (project.own / ".gitignore").read_text() == "*\n"
    queue.remove(project, second.id)
    assert [job.id for job in queue.jobs(project)][1:] == [third.id, first.id]
    there = {path.name for path in (project.own / "queue").iterdir()}
    assert there == {".lock", *(job.id for job in queue.jobs(project))}


def test_two_gpus_take_two_jobs_and_one_that_uses_what_another_makes_comes_after_it(project, monkeypatch):
    monkeypatch.setenv(fake_jobs.GPUS, "2")
    (project.root / "go").touch()
    encode = add(project, f"{UNTIL_GONE}\nraise SystemExit(1)", "cache/a", "encode")
    run = add(project, "", "runs/a", uses=["cache/a"])
    other = add(project, UNTIL_GONE, "runs/b")
    last = add(project, "", "runs/c")
    assert states(project) == ["running", "waiting", "running", "waiting"]
    waits = queue.waits_for(project, queue.jobs(project))
    assert waits[run.id].words == "encode cache/a"
    assert waits[last.id].words == "cache/a or runs/b"
    (project.root / "go").unlink()
    until(lambda: states(project) == ["failed", "waiting", "finished", "finished"])
    assert {queue.find(project, job.id).gpu for job in (encode, other)} == {"GPU 0", "GPU 1"}
    wait = queue.waits_for(project, queue.jobs(project))[run.id]
    assert wait.is_blocked
    assert wait.words == "encode cache/a, which did not finish. Do that again, or remove it from the list"
    queue.start_anyway(project, run.id)
    until(lambda: state(project, run) == "finished")


def test_a_job_of_two_gpus_waits_for_both_and_smaller_ones_do_not_pass_it(project, monkeypatch):
    monkeypatch.setenv(fake_jobs.GPUS, "2")
    (project.root / "go").touch()
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"
    first = add(project, UNTIL_GONE, "runs/a")
    both = queue.add(project, ["k5train", "sweep", show, "--gpus", "2"], "both", "sweep", "sweeps/b")
    last = add(project, "", "runs/c")
    assert states(project) == ["running", "waiting", "waiting"]  # a GPU is free, and is kept
    waits = queue.waits_for(project, queue.jobs(project))
    assert [waits[job.id].words for job in (both, last)] == ["runs/a", "runs/a and the job before it"]
    (project.root / "go").unlink()
    until(lambda: states(project) == ["finished"] * 3)
    both = queue.find(project, both.id)
    assert (both.gpu, both.slots, queue.tail(both)) == (
        "GPUs 0 and 1", ("GPU-0abc", "GPU-1abc"), "GPU-0abc,GPU-1abc\n"
    )  # fmt: skip
    assert queue.find(project, first.id).slots == ("GPU-0abc",)
    for words, count in ((["--gpus=3"], 3), (["--gpus", "x"], 1), (["--gpus", "0"], 1), (["--gpus"], 1), ([], 1)):
        assert gpus_of(["k5train", "run", *words]) == count


def test_a_job_that_is_stopped_saves_first_and_one_that_hangs_can_be_ended_at_once(project, monkeypatch):
    signal_before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a page that a script started with &
    job, second = add(project, SAVES), add(project, HANGS, "runs/b")
    signal.signal(signal.SIGINT, signal_before)
    until(lambda: "ready" in queue.tail(job))
    with pytest.raises(RunError, match=r"run runs/a is running"):
        queue.remove(project, job.id)
    queue.stop_run(project, project.root / "runs/a")
    queue.stop(project, job.id)  # once more, as of a second page: it is still only one Ctrl-C
    until(lambda: state(project, job) == "stopped")
    assert queue.tail(job) == "ready\nsaved\n"
    assert queue.find(project, job.id).exit_code == 130
    until(lambda: "ready" in queue.tail(second))
    third = add(project, "", "runs/c")
    queue.stop(project, second.id)
    until(lambda: queue.find(project, second.id).is_stopping)
    queue.stop(project, second.id, at_once=True)
    until(lambda: state(project, second) == "stopped")
    assert queue.find(project, second.id).signal == signal.SIGKILL
    until(lambda: state(project, third) == "finished")
    with pytest.raises(RunError, match="has ended already"):
        queue.stop(project, third.id)


def test_a_job_whose_worker_was_killed_is_lost_and_its_command_still_has_the_gpu(project):
    (project.root / "go").touch()
    job = add(project, f"{UNTIL_GONE}\nprint('the end')")
    until(lambda: queue.find(project, job.id).command is not None)
    second = add(project, "", "runs/b")
    os.kill(queue.find(project, job.id).worker, signal.SIGKILL)
    until(lambda: state(project, job) == "lost")
    assert "Its command still runs, as process" in queue.find(project, job.id).problem
    queue.advance(project)  # as a page does when it begins; a waiter now looks when the command ends
    assert state(project, second) == "waiting"
    assert queue.waits_for(project, queue.jobs(project))[second.id].words == "runs/a"
    with pytest.raises(RunError, match="is running"):
        queue.remove(project, job.id)
    (project.root / "go").unlink()
    until(lambda: state(project, second) == "finished")
    assert queue.tail(job) == "the end\n"
    assert state(project, job) == "lost"
    queue.remove(project, job.id)
    assert len(queue.jobs(project)) == 1


def test_a_command_in_a_terminal_has_its_gpu_until_it_ends(project):
    (project.root / "other").touch()
    job = add(project, "")
    assert queue.waits_for(project, queue.jobs(project))[job.id].words == "k5train sample runs/a (process 7)"
    assert queue.gpu_in_use(project) == "k5train sample runs/a (process 7)"
    (project.root / "other").unlink()
    until(lambda: state(project, job) == "finished")


def test_waiting_jobs_change_places_and_are_stopped_or_removed_before_they_begin(project):
    (project.root / "other").touch()
    jobs = [add(project, "", f"runs/{name}") for name in "abc"]
    queue.move(project, jobs[2].id, -1)
    queue.move(project, jobs[0].id, 5)
    assert [job.about for job in reversed(queue.jobs(project))] == ["runs/c", "runs/b", "runs/a"]
    queue.stop(project, jobs[0].id)
    assert queue.find(project, jobs[0].id).problem == "It was stopped before it began"
    with pytest.raises(RunError, match="does not wait any more"):
        queue.move(project, jobs[0].id, -1)
    for job in jobs:
        queue.remove(project, job.id)
    assert queue.jobs(project) == []
    (project.root / "other").unlink()


def test_what_a_damaged_queue_holds_is_named_and_nothing_outside_is_touched(project, tmp_path_factory):
    (project.root / "other").touch()
    job = add(project, "", files={"recipe.toml": "[train]\n"})
    folder = job.folder
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "abcdefabcdef"
    elsewhere.mkdir()
    (elsewhere / "job.json").write_text("{}")
    (folder.parent / "abcdefabcdef").symlink_to(elsewhere)
    (folder / "mine.txt").write_text("a note of the user")
    (folder / "log.txt").symlink_to(elsewhere / "job.json")
    assert [found.id for found in queue.jobs(project)] == [job.id]
    assert queue.tail(job) == ""
    for text in ('{"argv": ["k5', "[]", '{"argv": ["rm", "-rf"], "order": "x", "added": 1e999}', "\xff", "[" * 99999):
        (folder / "job.json").write_text(text, encoding="latin-1")
        damaged = queue.find(project, job.id)
        assert (damaged.state, damaged.label, damaged.argv) == ("failed", "A job whose file cannot be read", ())
    for id in ("abcdefabcdef", "../../runs", "", "0" * 12, "ABCDEFABCDEF"):
        with pytest.raises(NotHere, match="There is no such job"):
            queue.find(project, id)
    queue.remove(project, job.id)
    assert queue.jobs(project) == []
    assert (folder.with_name(f".old-{job.id}") / "mine.txt").exists()  # ours is gone, what is not ours stays
    assert (elsewhere / "job.json").read_text() == "{}"
    (project.root / "other").unlink()
    half = folder.parent / ".new-0123456789ab"
    half.mkdir()
    (half / "job.json").write_text("{}")
    second = add(project, "", "runs/b")
    assert not half.exists()
    until(lambda: state(project, second) == "finished" and queue.find(project, second.id).worker is None)
    until(lambda: queue.jobs(project) and not queue._children)  # a waiter that begins late still makes its lock file
    shutil.rmtree(project.own)
    assert queue.jobs(project) == []
    project.own.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="leads out of"):
        add(project, "")
    assert [path.name for path in elsewhere.iterdir()] == ["job.json"]


def test_a_queue_that_is_deleted_while_a_job_runs_does_not_stop_it(project):
    (project.root / "go").touch()
    job = add(project, f"{UNTIL_GONE}\nopen('done', 'w')")
    until(lambda: queue.find(project, job.id).command is not None)
    shutil.rmtree(project.own)
    (project.root / "go").unlink()
    until((project.root / "done").exists)
    assert queue.jobs(project) == []


def written(project: Project, **documents: dict) -> Job:
    """A job whose files say this."""
    job = {"argv": ["k5train", "run"], "label": "x", "kind": "run", "about": "runs/x", "order": 1, "added": 5.0}
    folder = job_files.new_folder(job_files.make_queue_folder(project), job, {})
    for name, document in documents.items():
        job_files.write(folder, f"{name}.json", document)
    return queue.read_job(folder)


def test_a_state_is_told_after_a_reboot_a_clock_set_back_and_from_another_machine(project, monkeypatch):
    me = job_files.process_of(os.getpid())
    begun = {"launcher": me, "at": time.time() + 9000, "boot": system.boot_mark(), "monotonic": time.monotonic() - 60}
    running = written(project, started={**begun, "worker": me})
    assert running.state == "running"
    assert 60 <= running.seconds < 70  # although it began in the future
    assert written(project, started={**begun, "worker": me, "boot": "another"}).seconds == 0
    assert written(project, started=begun).state == "running"  # its launcher has not come to name the worker
    other_boot = {**me, "mark": "another 123"}
    for gone in ({"worker": other_boot}, {"launcher": other_boot}, {"worker": {"pid": "x"}}, {"worker": None}):
        assert written(project, started={**begun, **gone}).state == "lost"
    away = {**me, "host": "elsewhere"}
    job = written(project, started={**begun, "worker": away}, worker={"worker": away})
    assert (job.state, job.worker) == ("running", None)
    os.utime(job.folder / "worker.json", (1, 1))
    assert queue.read_job(job.folder).state == "lost"
    for ended, expected in (
        ({"exit_code": 0, "is_stopped": True}, "finished"), ({"exit_code": 130}, "stopped"), ({"signal": 9}, "failed"),
        ({"signal": 9, "is_stopped": True}, "stopped"), ({"exit_code": "0"}, "failed"), ({}, "failed"),
    ):  # fmt: skip
        assert written(project, started=begun, ended=ended).state == expected
    (project.own / "queue" / running.id / "ended.json").write_text('{"exit_code": 0')  # half written
    assert queue.find(project, running.id).state == "running"


def test_a_process_that_ended_and_is_not_reaped_is_not_running():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    until(lambda: "Z" in Path(f"/proc/{pid}/stat").read_text())
    assert system.process_mark(pid) is None
    os.waitpid(pid, 0)
    assert system.process_mark(pid) is None
    assert system.process_mark(os.getpid()) == system.process_mark(os.getpid()) is not None


def test_a_log_that_grows_endlessly_is_kept_small_with_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MOST_LOG_BYTES", 1000)
    monkeypatch.setattr(worker, "KEPT_BYTES", 100)
    job = Job("0" * 12, tmp_path, "x", (), "run", "", "running", 1)
    log = system.open_bytes(job.log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for number in range(1000):
        os.write(log, f"line {number}\n".encode())
        worker.shorten(log, tmp_path)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1300
    os.write(log, b"\x1b[1m<b>\xff")
    os.close(log)
    assert queue.tail(job, 30) == "line 998\nline 999\n\x1b[1m<b>\\xff"
    assert queue.tail(job, 10000).startswith("... the log had ")


def test_bars_are_read_from_the_file_that_the_command_writes(tmp_path):
    job = Job("0" * 12, tmp_path, "x", (), "run", "", "running", 1, command=1)
    assert queue.progress(job) is None
    task = {"name": "training <b>", "completed": 3, "total": 10, "unit": "step", "note": "loss 0.1", "per_second": 2}
    job_files.write(tmp_path, "progress.json", {"tasks": [task, "x", {"name": 7, "completed": None}]})
    first, second = queue.progress(job).tasks
    assert (first.name, first.completed, first.total, first.per_second) == ("training <b>", 3, 10, 2)
    assert (second.name, second.completed, second.total) == ("", 0, None)


def test_the_command_is_told_its_gpu_and_to_print_plainly(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("PYTHONPATH", "src")
    env = worker.variables({"env": {"HIP_VISIBLE_DEVICES": "1"}}, tmp_path)
    assert env["HIP_VISIBLE_DEVICES"] == "1"
    assert env["PYTHONUNBUFFERED"] == env["NO_COLOR"] == "1"
    assert env["K5_PROGRESS"] == str(tmp_path / "progress.json")
    assert env["PYTHONPATH"].split(os.pathsep) == [str(Path(__file__).parents[1]), str(Path("src").absolute())]
    assert "FORCE_COLOR" not in env
    assert worker.command_of(["k5train", "run"]) == [sys.executable, "-P", "-m", "k5train", "run"]


def test_a_command_of_a_terminal_uses_the_first_gpu_that_its_variables_name():
    gpus = tuple(slots.Slot(key, n, "a GPU", slots.NVIDIA) for n, key in enumerate(("GPU-aaaa1111", "MIG-cccc")))
    for variables, expected in (
        ({}, 0), (None, 0), ({"CUDA_VISIBLE_DEVICES": "MIG-cccc,0"}, 1), ({"CUDA_VISIBLE_DEVICES": ""}, None),
    ):  # fmt: skip
        assert slots.slots_of(gpus, variables) == (() if expected is None else (gpus[expected],))
    for variables, expected in ((None, (0, 1)), ({"CUDA_VISIBLE_DEVICES": "MIG-cccc,0,7"}, (1, 0))):
        assert slots.slots_of(gpus, variables, 3) == tuple(gpus[number] for number in expected)
    assert slots.slots_of((slots.PROCESSOR,), {"CUDA_VISIBLE_DEVICES": ""}) == (slots.PROCESSOR,)


def test_a_card_that_amds_runtime_shows_alone_is_that_one(monkeypatch):
    monkeypatch.delenv("ROCR_VISIBLE_DEVICES", raising=False)
    cards = tuple(slots.Slot(str(n), n, "an AMD GPU", slots.AMD, f"GPU-{n:016x}") for n in range(3))
    for variables, numbers in (
        ({"ROCR_VISIBLE_DEVICES": "1"}, [1]), ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000002,1"}, [2, 1]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [2]), ({"ROCR_VISIBLE_DEVICES": ""}, []),
    ):  # fmt: skip
        assert slots.slots_of(cards, variables, 2) == tuple(cards[n] for n in numbers), variables
    monkeypatch.setenv(
        "ROCR_VISIBLE_DEVICES", "1,2"
    )  # of a cluster, for the page too: the slots are counted among these
    assert slots.slots_of(cards[:2], {"ROCR_VISIBLE_DEVICES": "1,2"}) == cards[:1]
    assert slots.PROCESSOR.env == {}


def test_commands_of_ours_are_known_however_they_are_started():
    for line, expected in (
        (["/usr/bin/python3", "/venv/bin/k5train", "run", "cache/a"], ("k5train", "run", "cache/a")),
        (["python", "-P", "-m", "k5cache", "encode", "d"], ("k5cache", "encode", "d")),
        (["C:\\venv\\Scripts\\k5train.exe", "sweep"], ("k5train", "sweep")),
        (["python", "-W", "ignore", "/x/k5train/__main__.py", "sample"], ("k5train", "sample")),
        (["python", "-m", "k5train.ui.jobs.worker", "/p/.k5/queue/0"], ()),
        (["vim", "notes.txt", "k5train"], ()), (["python", "-m", "pytest", "k5train"], ()), ([], ()), (["-m"], ()),
    ):  # fmt: skip
        assert processes.command_of(line) == expected, line
    assert processes.uses_gpu(("k5train", "run", "cache/a"))
    assert processes.is_on_processor(("k5cache", "encode", "d", "--device", "cpu"))
    for words in (("k5train", "ui"), ("k5train", "run", "--help"), ("k5cache", "verify", "c"), ("k5train",), ()):
        assert not processes.uses_gpu(words), words


SWEEP = """
import subprocess, sys
worker = [sys.executable, "-P", "-m", "k5train.training.sweep_worker"]
print(subprocess.Popen(worker, stdin=int(sys.argv[2]), stdout=subprocess.DEVNULL).pid, flush=True)
sys.stdin.read()
"""


def test_workers_of_a_sweep_that_was_killed_still_have_their_gpus(project):
    import subprocess

    script = project.root / "k5train"
    script.write_text(SWEEP)
    orders, held = os.pipe()  # their input stays open: they have not noticed yet, or are saving
    env = {**system.environment(), "CUDA_VISIBLE_DEVICES": "GPU-1"}
    command = [sys.executable, str(script), "sweep", str(orders)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, pass_fds=[orders]) as sweep:
        os.close(orders)
        pid = int(sweep.stdout.readline())
        assert pid not in [process.pid for process in processes.working([])]  # the sweep itself is there
        sweep.kill()
    try:
        (left,) = [process for process in processes.working([]) if process.pid == pid]
        gpus = tuple(slots.Slot(f"GPU-{n}", n, "a GPU", slots.NVIDIA) for n in range(2))
        assert slots.slots_of(gpus, left.variables) == gpus[1:]
    finally:
        os.close(held)  # and with it, it ends


@pytest.mark.parametrize(
    ("line", "is_left"), [("k5train sweep c", False), ("k5train ui", True), ("/sbin/init", True), (None, True)]
)
def test_a_worker_is_left_alone_where_its_parent_is_no_sweep(line, is_left):
    import psutil

    def parent() -> SimpleNamespace:
        if line is None:
            raise psutil.NoSuchProcess(1)
        return SimpleNamespace(cmdline=line.split)

    assert processes._is_left_alone(SimpleNamespace(parent=parent)) == is_left


RUN_IN_TERMINAL = """
import json, os, sys, time
from k5cache.shared.lock import lock_file
from pathlib import Path
with lock_file(Path(sys.argv[2])):
    try:
        print("ready", flush=True)  # from here on it may be stopped
        time.sleep(60)
    except KeyboardInterrupt:
        print("saved", flush=True)
"""


def test_a_run_in_a_terminal_is_stopped_only_if_it_is_surely_the_process_that_has_its_lock(project):
    import subprocess

    run = project.root / "runs" / "cats"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(RunError, match="is not being worked on"):
        queue.stop_run(project, run)
    script = project.root / "k5train"  # the name by which it is known
    script.write_text(RUN_IN_TERMINAL)
    command = [sys.executable, str(script), "run", str(run / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=system.environment()) as process:
        assert process.stdout.readline() == b"ready\n"
        for found in (processes.working([run / ".lock"], run), processes.working([])):
            assert process.pid in [other.pid for other in found]
        assert process.pid not in [other.pid for other in processes.working([], run)]
        lock = json.loads((run / ".lock").read_text())
        copy = project.root / "runs" / "copied"  # its lock names a process of ours that does not have it
        copy.mkdir()
        assert not processes._has_lock(process.pid, copy / ".lock")
        assert not processes._has_lock(os.getpid(), run / ".lock")  # this process is none of ours
        assert lock["pid"] == process.pid
        queue.stop_run(project, run)
        assert process.stdout.read() == b"saved\n"
    with pytest.raises(RunError, match="is not being worked on"):
        queue.stop_run(project, run)
    (run / ".lock").write_text(" " + json.dumps({**lock, "host": "elsewhere"}))
    assert not system.interrupt_process(os.getpid(), lambda: False)


def test_a_project_that_cannot_be_written_says_so(project, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # tests may run as a user who may all
    for change in (
        lambda: add(project, ""), lambda: queue.stop(project, "0" * 12), lambda: queue.remove(project, "0" * 12)
    ):  # fmt: skip
        with pytest.raises(OutputError, match="there is no permission"):
            change()
    queue.advance(project)
    assert not project.own.exists()


def test_several_pages_may_add_at_once(project):
    (project.root / "other").touch()
    threads = [threading.Thread(target=add, args=(project, "", f"runs/{n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job.order for job in queue.jobs(project)) == [1, 2, 3, 4]
    queue.clear(project)
    assert len(queue.jobs(project)) == 4  # none of them has ended
    for job in queue.jobs(project):
        queue.remove(project, job.id)
    (project.root / "other").unlink()


def test_what_the_modules_name_alike_is_alike():
    from k5cache.shared import progress_file

    assert progress_file.VARIABLE == worker.PROGRESS_VARIABLE
    assert job_module.now().keys() == {"at", "monotonic", "boot"}


def test_a_job_that_came_with_a_strangers_project_runs_nothing_until_a_person_says_so(project):
    (project.root / "go").touch()
    first = add(project, UNTIL_GONE)
    ours = add(project, "open('ours', 'w')", "runs/b", files={"recipe.toml": "a = 1\n"})
    theirs = project.own / "queue" / ("b" * 12)
    shutil.copytree(ours.folder, theirs)  # as it comes out of an archive: whole, with its seal, in another folder
    document = json.loads((theirs / "job.json").read_text())
    document |= {"argv": ["k5train", "run", "open('theirs', 'a').write('x')"], "order": 0}
    (theirs / "job.json").write_text(json.dumps(document))
    changed = add(project, "open('changed', 'w')", "runs/c", files={"recipe.toml": "a = 1\n"})
    (changed.folder / "recipe.toml").write_text("a = 2\n")
    (project.root / "go").unlink()
    until(lambda: state(project, ours) == state(project, first) == "finished")
    queue.advance(project)
    assert [state(project, queue.find(project, id)) for id in ("b" * 12, changed.id)] == ["waiting", "waiting"]
    wait = queue.waits_for(project, queue.jobs(project))["b" * 12]
    assert (wait.is_blocked, wait.is_due) == (True, False)
    assert wait.words.startswith("you: it was not put in on this machine, or was changed since. It would run: k5train")
    queue.start_anyway(project, "b" * 12)
    until(lambda: state(project, queue.find(project, "b" * 12)) == "finished")
    assert [(project.root / name).exists() for name in ("ours", "theirs", "changed")] == [True, True, False]
    (theirs / "job.json").write_text(json.dumps({**document, "seal": "x"}))
    with pytest.raises(RunError, match="not put in on this machine"):
        again(project, "b" * 12)
    assert (project.root / "theirs").read_text() == "x"
