"""A sweep over several GPUs: who is done gets the next run, who is lost costs one, and all stop together.

A small script stands for the workers here; ``test_sweep.py`` has a sweep with two real ones.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from k5cache.shared import gpus, system
from k5cache.shared.errors import DoesNotFit, K5Error, RecipeError
from k5cache.shared.gpus import Slot
from k5cache.shared.lock import holder
from k5cache.shared.model import ModelConfig
from k5train.cli import app
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.planning.host_memory import check_host_memory
from k5train.planning.memory import Plan, Streaming
from k5train.planning.saved_plan import SavedPlan
from k5train.training import sweep_on_gpus
from k5train.training.gpu_process import Event, GpuProcess, module
from k5train.training.sweep import check_devices, used_gpus, wait_for_what_is_saved
from k5train.training.sweep_folder import Place
from k5train.training.sweep_job import Job, read_job
from k5train.training.sweep_on_gpus import Crew, names_of, together
from k5train.training.sweep_runs import SweepRun
from k5train.training.sweep_worker import Worker
from tests.cli import Cli

TWO = tuple(Slot(f"GPU-{n}", n, "a GPU", gpus.NVIDIA) for n in range(2))
WORKER = """
import json, os, signal, sys, time
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
def say(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    label = order.get("label", "")
    if order["do"] == "end":
        if gpu in os.environ.get("HANGS_AT_END", ""):
            os.kill(os.getpid(), signal.SIGSTOP)
        break
    elif order["do"] == "stop":
        time.sleep(float(os.environ.get("SAVES_FOR", 0)))
        say("stopped", said="Stopped and saved at step 7. Go on with: k5train resume x")
        sys.exit(130)
    elif order["do"] == "begin":
        if order["job"].get("dies") == gpu:
            sys.exit("no driver")
        print("Loading torch ...", file=sys.stderr, flush=True)
        say("begun", precision=None)
    elif order["do"] == "plan":
        if gpu in os.environ.get("LOST", ""):
            sys.exit("CUDA error")
        if gpu in os.environ.get("REFUSING", ""):
            say("refused", problem="The plan needs 40 GiB", fix="Use a larger card")
        else:
            say("planned", host_bytes=0)
    elif order["do"] == "load":
        say("loaded")
    elif label.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif label.startswith("hang"):
        print("hangs", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif label.startswith("long"):
        say("progress", tasks=[{"name": "training", "completed": 7, "total": 9, "unit": "step", "note": ""}])
    elif label.startswith("told"):
        say("stopped", said="Stopped in the middle of step 3, which is not saved. Go on with: k5train resume x")
        sys.exit(130)
    elif label.startswith("bad"):
        say("ended", label=label, problem="the loss is not finite", fix="Lower train.optim.lr")
    else:
        if label.startswith("threads"):
            print("has", os.environ.get("OMP_NUM_THREADS"), "threads", file=sys.stderr, flush=True)
        time.sleep(0.4 if gpu == "GPU-0" else 0.02)
        say("ended", label=label, problem=None, fix=None)
"""


class Ended:
    """What a crew says of its runs' ends."""

    def __init__(self) -> None:
        self.problems: dict[str, str | None] = {}
        self.stop_after = ""

    def __call__(self, label: str, error: K5Error | None) -> None:
        self.problems[label] = error.problem if error else None
        if label == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def crew_of(monkeypatch):
    """``crew_of(labels)``: a crew of scripts, and what it says."""
    monkeypatch.setattr(sweep_on_gpus, "WORKER", [sys.executable, "-S", "-E", "-c", WORKER])

    def make(*labels: str, **facts: object) -> tuple[Crew, Ended]:
        runs = [SimpleNamespace(label=label) for label in labels]
        ended = Ended()
        return Crew(SimpleNamespace(to_json=lambda: facts, sweep_runs=runs), labels, lambda _: None, ended), ended

    return make


def test_a_fast_gpu_trains_more_runs(crew_of, capsys):
    crew, ended = crew_of(*"abcdefgh")
    crew.run(TWO)
    assert ended.problems == dict.fromkeys("abcdefgh")
    told = capsys.readouterr().err
    assert told.count("on GPU 1: ") > 2 * told.count("on GPU 0: ") > 0
    assert told.count("Loading torch ...") == 1


def test_a_gpu_has_its_next_run_while_the_states_of_the_last_one_are_removed(crew_of):
    crew, ended = crew_of(*"abc")
    trained = []
    crew.ended = lambda label, error: (trained.append((label, list(crew.training.values()))), ended(label, error))
    crew.run(TWO[:1])
    assert trained == [("a", ["b"]), ("b", ["c"]), ("c", [])]


def test_workers_share_the_cores_out(crew_of, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [system.shared_threads(n, {})["OMP_NUM_THREADS"] for n in (1, 2, 3, 16)] == ["8", "4", "2", "1"]
    assert system.shared_threads(2, {"OMP_NUM_THREADS": "7"}) == {}
    crew, _ = crew_of("threads-1", "threads-2")
    crew.run(TWO)
    told = capsys.readouterr().err
    assert told.count("has 4 threads") == 2


def test_a_run_that_fails_and_a_worker_that_is_killed_cost_only_themselves(crew_of, capsys):
    crew, ended = crew_of("bad", "kill", "a", "b", "c")
    crew.run(TWO)
    assert ended.problems.pop("bad") == "the loss is not finite"
    lost = str(ended.problems.pop("kill"))
    assert lost.startswith("it was not finished on GPU ")
    assert lost.endswith("its process was killed by signal 9, as the system does when memory runs out")
    assert ended.problems == dict.fromkeys("abc")
    assert "The same command goes on with it, from the last state that it saved" in capsys.readouterr().err


def test_a_gpu_on_which_workers_are_lost_again_and_again_is_given_up(crew_of, capsys):
    crew, ended = crew_of("a", "b", dies="GPU-0")
    crew.run(TWO)
    assert ended.problems == {"a": None, "b": None}
    told = capsys.readouterr().err
    assert told.count("GPU 0 was lost before it could train: its process ended with exit code 1: no driver") == 2
    crew, ended = crew_of("kill-1", "kill-2", "kill-3", "kill-4", "a")
    crew.run(TWO)
    assert ended.problems["a"] == "not begun: no GPU was left that could train it"


def test_ctrl_c_stops_all_and_says_what_each_has_saved(crew_of):
    crew, ended = crew_of("long", "a")
    ended.stop_after = "a"
    with pytest.raises(KeyboardInterrupt, match=r"^Stopped; long: saved at step 7$"):
        crew.run(TWO)
    # Of "a" there is nothing to stop: its worker was sent away.
    said = "its process ended with exit code {}: Loading torch ..."
    assert {worker.how_it_ended for worker in crew._all} == {said.format(130), said.format(0)}


def test_a_worker_that_hangs_is_named_and_a_second_ctrl_c_ends_it(crew_of, monkeypatch, capsys):
    crew, ended = crew_of("hang", "a")
    ended.stop_after = "a"
    monkeypatch.setattr(sweep_on_gpus, "SECONDS_TO_END", 0.3)
    warn, waited_for = sweep_on_gpus.console.warn, []

    def press(line: str) -> None:
        warn(line)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_on_gpus.console, "warn", press)
    monkeypatch.setattr(GpuProcess, "wait", lambda self, seconds: waited_for.append((self.name, self._process.poll())))
    with pytest.raises(KeyboardInterrupt) as stopped:
        crew.run(TWO)
    assert str(stopped.value) == "Stopped; hang: the last step that was saved stays"
    (hung,) = [worker for worker in crew._all if "hangs" in worker.last_lines]
    assert f"Still waiting for {hung.name} to stop. Ctrl-C again does not wait" in capsys.readouterr().err
    assert (hung.name, -9) in waited_for  # it was told often enough, and is not waited for again


def test_ctrl_c_while_the_last_ones_end_leaves_none_with_its_gpu(crew_of, monkeypatch):
    monkeypatch.setenv("HANGS_AT_END", "GPU-0 GPU-1")
    crew, _ = crew_of("a")
    monkeypatch.setattr(GpuProcess, "wait", lambda *arguments: raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        crew.run(TWO)
    assert [worker._process.poll() for worker in crew._all] == [-9, -9]


def test_an_error_of_the_sweep_itself_lets_the_runs_that_are_trained_save(crew_of):
    crew, _ = crew_of("long", "a")
    crew.ended = lambda label, error: 1 / 0
    with pytest.raises(ZeroDivisionError):
        crew.run(TWO)
    assert crew.stopped == {"long": "saved at step 7"}


def test_an_end_that_cannot_be_noted_while_all_stop_leaves_the_others_their_time_to_save(crew_of, monkeypatch, capsys):
    monkeypatch.setenv("SAVES_FOR", "1")  # "b" ends meanwhile
    crew, _ = crew_of("long", "a", "b", "c")
    crew.ended = lambda label, error: raises(OSError(errno.ENOSPC, f"No space left for {label}"))
    with pytest.raises(OSError, match="No space left for a"):
        crew.run(TWO)
    assert crew.stopped["long"] == "saved at step 7"
    assert "b: how it ended is not noted: [Errno 28] No space left for b" in capsys.readouterr().err


def test_a_run_that_has_ended_is_noted_also_if_ctrl_c_meets_the_next_order(crew_of, monkeypatch):
    crew, ended = crew_of("a", "b")
    give = crew.give_next
    monkeypatch.setattr(
        crew, "give_next", lambda worker: give(worker) if "a" in crew.left else raises(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt, match=r"^Stopped$"):
        crew.run(TWO[:1])
    assert ended.problems == {"a": None}


def test_a_worker_that_somebody_stops_stops_the_sweep(crew_of, capsys):
    crew, _ = crew_of("long", "told", "never")  # as the page does with a run of a sweep
    with pytest.raises(KeyboardInterrupt) as stopped:
        crew.run(TWO)
    said = {"long: saved at step 7", "told: in the middle of step 3, which is not saved"}
    assert set(str(stopped.value).removeprefix("Stopped; ").split("; ")) == said
    assert "Stopping: each run saves its state first" in capsys.readouterr().err


def test_a_gpu_without_room_is_left_out_and_none_with_room_is_an_error(crew_of, monkeypatch, capsys):
    monkeypatch.setenv("REFUSING", "GPU-0")
    crew, ended = crew_of("a", "b")
    crew.run(TWO)
    assert ended.problems == {"a": None, "b": None}
    assert "GPU 0 is not used: The plan needs 40 GiB. Use a larger card" in capsys.readouterr().err
    monkeypatch.setenv("REFUSING", "GPU-0 GPU-1")
    with pytest.raises(K5Error, match="The plan needs 40 GiB\nUse a larger card"):
        crew_of("a", "b")[0].run(TWO)
    assert "is not used" not in capsys.readouterr().err


def test_a_refusal_is_said_if_the_others_are_lost_before_it_could_be(crew_of, monkeypatch, capsys):
    monkeypatch.setenv("REFUSING", "GPU-1")
    monkeypatch.setenv("LOST", "GPU-0")
    crew, ended = crew_of("a")
    gone = crew.on_gone
    later = lambda worker, facts: crew._events.put(Event(worker, "gone"))  # noqa: E731
    monkeypatch.setattr(crew, "on_gone", lambda *said: gone(*said) if crew.refusals else later(*said))
    crew.run(TWO)
    assert ended.problems == {"a": "not begun: no GPU was left that could train it"}
    assert "GPU 1 is not used: The plan needs 40 GiB. Use a larger card" in capsys.readouterr().err


def test_workers_that_stream_more_than_there_is_say_how_many_fit():
    check_host_memory([0, 0], 0)
    check_host_memory([6 * 2**30] * 2, 14 * 2**30)
    with pytest.raises(DoesNotFit) as raised:
        check_host_memory([6 * 2**30] * 4, 23 * 2**30)
    assert raised.value.problem == (
        "4 GPUs need 28.0 GiB of host memory together, as each streams up to 6.0 GiB of weights from it, and 23.0 GiB "
        "is free"
    )
    assert raised.value.fix.startswith("Use --gpus 3, close other programs")


def test_int8_tensor_cores_are_used_if_all_gpus_have_them():
    assert together([None, None]) is None
    assert together(["int8-dynamic", "int8-dynamic"]) == "int8-dynamic"
    assert together(["int8-dynamic", "int8-quanto"]) == "int8-quanto"


def test_parts_of_a_divided_gpu_have_names_of_their_own():
    parts = [Slot("MIG-a", 1, "", gpus.NVIDIA), Slot("GPU-0", 0, "", gpus.NVIDIA), Slot("MIG-b", 1, "", gpus.NVIDIA)]
    assert names_of(parts) == ["GPU 1, part 1", "GPU 0", "GPU 1, part 2"]


def test_no_more_gpus_than_runs_are_used_and_a_named_device_is_refused(capsys):
    assert used_gpus(TWO, 3) == TWO
    assert capsys.readouterr().err == ""
    assert used_gpus(TWO, 1) == TWO[:1]
    assert "1 run is left to train, so 1 GPU of 2 will be used" in capsys.readouterr().err
    config = TrainConfig()
    check_devices([SweepRun("a", config), SweepRun("b", replace(config, device="cuda"))])
    with pytest.raises(RecipeError, match=r"train.device=cuda:1 and several GPUs contradict each other"):
        check_devices([SweepRun("a", replace(config, device="cuda:1"))])


def test_a_job_arrives_as_it_was_sent():
    config = TrainConfig(data=(DataConfig(cache="a", repeats=2), DataConfig(cache="b")), epochs=2, max_hours=0.5)
    place = Place(None, Path("out"), ModelConfig("t2i-lite-pretrain"), Path("model"))
    plan = Plan(("all", "nothing"), Streaming(2), {"weights": 5}, 100, 7, (64, 9), True)
    job = Job(place, (SweepRun("a", config), SweepRun("b", TrainConfig())), SavedPlan(Path("out/a"), plan))
    assert read_job(json.loads(json.dumps(job.to_json()))) == job
    other = Job(replace(place, cache=Path("c")), job.sweep_runs)
    assert read_job(json.loads(json.dumps(other.to_json()))) == other
    assert {run.config.base_model_precision for run in job.with_precision("int8-quanto").sweep_runs} == {"int8-quanto"}


def test_a_worker_whose_parent_was_killed_stops():
    done = subprocess.run(
        module("k5train.training.sweep_worker"), input=b"", capture_output=True, timeout=60, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert (done.returncode, json.loads(done.stdout)) == (130, {"event": "stopped", "said": ""})


SAVES_SLOWLY = """
from k5train.training import sweep_worker
def work(worker):
    try:
        worker.channel.say("begun")
        worker.channel.next_order()
    except KeyboardInterrupt:
        worker.channel.say("saving")
        worker.channel.next_order()
        raise KeyboardInterrupt("all is saved")
sweep_worker.Worker.work = work
sweep_worker.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="there SIGTERM ends a process at once")
@pytest.mark.parametrize(
    ("first", "then", "said"),
    [("SIGTERM", "stop", "all is saved"), ("stop", "SIGTERM", "all is saved"), ("stop", "hurry", "")],
)
def test_a_sigterm_to_all_and_the_order_of_the_parent_are_one_ctrl_c(first, then, said):
    """As a cluster sends it to every process of a job: a second Ctrl-C would not wait for what is being saved."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SAVES_SLOWLY]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=system.environment()) as worker:

        def tell(what: str) -> None:
            if what == "SIGTERM":
                worker.terminate()
            else:
                worker.stdin.write(json.dumps({"do": what}).encode() + b"\n")
                worker.stdin.flush()

        assert json.loads(worker.stdout.readline()) == {"event": "begun"}
        tell(first)
        assert json.loads(worker.stdout.readline()) == {"event": "saving"}
        tell(then)
        if said:
            tell("it is saved now")
        assert json.loads(worker.stdout.readline()) == {"event": "stopped", "said": said}


def test_an_error_of_the_disk_is_an_answer_and_a_mistake_of_ours_is_not(monkeypatch):
    said: list[tuple[str, dict]] = []
    orders = iter([{"do": "load"}, {"do": "end"}])
    channel = SimpleNamespace(next_order=lambda: next(orders), say=lambda event, **facts: said.append((event, facts)))
    full = OSError(errno.ENOSPC, "No space left on device", "/k5/base.safetensors")
    monkeypatch.setattr(Worker, "load", lambda self, order: raises(full))
    Worker(channel).work()
    ((event, facts),) = said
    assert (event, facts["problem"]) == ("refused", "The disk is full while writing /k5/base.safetensors")
    orders = iter([{"do": "load"}])
    monkeypatch.setattr(Worker, "load", lambda self, order: raises(KeyError("a bug")))
    with pytest.raises(KeyError):
        Worker(channel).work()


def raises(error: BaseException) -> None:
    raise error


def test_a_sweep_waits_for_what_a_killed_one_still_saves(tmp_path, capsys):
    runs = [SweepRun(label, TrainConfig()) for label in "ab"]
    (tmp_path / "b").mkdir()
    script = "import sys; from k5cache.shared.lock import lock_file; from pathlib import Path\n"
    script += "with lock_file(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "b" / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=system.environment()) as saving:
        saving.stdout.readline()
        wait_for_what_is_saved(tmp_path, runs, seconds=0.2)  # in vain: the run itself is refused then
        assert holder(tmp_path / "b" / ".lock").pid == saving.pid
        threading.Timer(0.3, saving.stdin.close).start()
        wait_for_what_is_saved(tmp_path, runs, seconds=60)
        assert holder(tmp_path / "b" / ".lock") is None
    said = f"Waiting for process {saving.pid}, which has {tmp_path / 'b'}, to save and end"
    assert capsys.readouterr().err.replace("\n", "").count(said.replace("\n", "")) == 2


def test_a_number_of_gpus_that_cannot_be_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "installed", lambda: TWO)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, problem in (
        ("3", "--gpus 3: this machine has 2 GPUs"), ("0", "--gpus 0 is not a number"), ("-1", "--gpus -1 is not a"),
    ):  # fmt: skip
        done = Cli(tmp_path)(app, "sweep", "cache", "--grid", "train.lora.rank=2,4", "--gpus", count)
        assert done.code == 2
        assert f"error: {problem}" in done.err
        assert not list(tmp_path.iterdir())
