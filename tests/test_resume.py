"""Exact resume: a run that was killed, stopped or crashed ends with the bits of an undisturbed one, or says why not."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k5cache.shared import files, interrupt
from k5cache.shared.errors import RunError
from k5cache.shared.recipe import to_dict
from k5cache.shared.sealed import seal, unseal
from k5train.cli import app
from k5train.options.adapter import LoraConfig
from k5train.options.data import DataConfig
from k5train.options.objective import RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import ObjectiveConfig
from k5train.runs import resume_state
from k5train.runs.folder import Run, lock_run
from k5train.runs.resume_state import Progress, SavedState
from k5train.training import identity, loop, step
from k5train.training.optimizer import make_optimizer
from k5train.training.optimizer_state import optimizer_state, restore_optimizer
from tests.cli import Cli
from tests.runs import CONFIG, go_on, lora_of, metrics_of, numbers, same, start_run, state_of


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, toy_model) -> Path:
    """Twenty steps without a break."""
    root = tmp_path_factory.mktemp("whole") / "run"
    start_run(root, cache, toy_model, CONFIG)
    return root


class Stop(Exception):
    """Stands for a crash."""


@pytest.fixture
def crash_at(monkeypatch):
    """``crash_at(n)``: update n raises before it changes anything. Ctrl-C comes before it, since updates defer it."""

    def arrange(number: int, error: BaseException | None = None) -> None:
        seen = 0
        is_interrupt = isinstance(error, KeyboardInterrupt)
        update = loop.accumulate if is_interrupt else step.update

        def failing(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == number:
                raise error or Stop
            return update(*args, **kwargs)

        name = "k5train.training.loop.accumulate" if is_interrupt else "k5train.training.session.update"
        monkeypatch.setattr(name, failing)

    return arrange


# Each training process is forked from one that has already imported everything, so it starts at once.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from k5train.cli import main
from k5train.training import carry_out, picture_rows, shared_base  # what a run imports when it begins
from tests.runs import CONFIG, go_on, start_run
root, cache, model, most_kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
chance = random.Random(7)

def attempt():
    if (root / "recipe.toml").exists():
        go_on(root)
    else:
        start_run(root, cache, model, CONFIG)

kills, allowed = 0, 0.5
while True:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            attempt()
            code = 0
        finally:
            os._exit(code)
    # The first kill comes while the run is being made, later ones anywhere in it.
    end = time.monotonic() + (chance.uniform(0, 0.1) if not kills else chance.uniform(0.1, allowed))
    done = 0
    while kills < most_kills and time.monotonic() < end and not done:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
    if kills >= most_kills and not done:
        done, status = os.waitpid(pid, 0)
    if done:
        print(kills, os.waitstatus_to_exitcode(status))
        break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills, allowed = kills + 1, allowed + 0.25

# Two commands in this interpreter, which no test has loaded anything into: which modules have they loaded?
os.environ["COLUMNS"] = "200"
run = ["run", cache, "--model", model, "-o", root.parent / "lean", "--set", "train.steps=1"]
for words in (["selftest", cache], run):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        sys.argv = ["k5train", *map(str, words), "--set", "train.device=cpu", "--set", "train.mixed_precision=fp32"]
        code = 1
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            encoders = ("transformers.models.qwen2", "transformers.models.clip", "k5cache.encoders", "torchvision")
            loaded = [m for m in sys.modules if m.startswith(encoders) and (".modeling_" in m or "transf" not in m)]
            print("after", words[0], code, *loaded, flush=True)
            os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, cache, toy_model) -> Callable[[int], tuple[Path, list[str]]]:
    """``killed(n)``: the folder of a run that was killed up to n times, and what ``KILLER`` printed."""

    def kill(most_kills: int) -> tuple[Path, list[str]]:
        root = tmp_path_factory.mktemp("killed") / "run"
        words = [str(root), str(cache), str(toy_model), str(most_kills)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", KILLER, *words],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return root, done.stdout.splitlines()

    return functools.cache(kill)


def test_neither_training_nor_the_selftest_loads_an_encoders_modelling_module(killed):
    said = [line for line in killed(3)[1] if line.startswith("after")]
    assert said == ["after selftest 0", "after run 0"]


@pytest.mark.parametrize("most_kills", [3, pytest.param(8, marks=pytest.mark.long)])
def test_twenty_steps_with_kills_at_random_instants_end_with_the_same_bits(whole, killed, most_kills):
    root, said = killed(most_kills)
    kills, code = next(line for line in said if line[0].isdigit()).split()
    assert code == "0", said
    assert int(kills) >= min(3, most_kills - 1)  # really killed; a fast machine may come to the end
    assert same(state_of(root), state_of(whole))
    assert same(lora_of(root), lora_of(whole))
    assert numbers(metrics_of(root)) == numbers(metrics_of(whole))
    assert [row["step"] for row in metrics_of(root)] == list(range(1, 21))
    assert [p.name for p in root.rglob(".*") if p.name != ".lock"] == []  # nothing half-written is left


def test_the_state_holds_raw_matrices_moments_and_the_average_in_safetensors_and_json_only(whole):
    files = sorted(p.name for p in (whole / "state" / "step-000020").iterdir())
    assert files == ["adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "step.json"]
    tensors = state_of(whole)
    names = {name.removeprefix("adapter/") for name in tensors if name.startswith("adapter/")}
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    moments = {name for name in tensors if name.startswith("optimizer/")}
    assert {f"optimizer/{name}/{kind}" for name in names for kind in ("exp_avg", "exp_avg_sq", "step")} == moments
    assert sorted(p.name for p in (whole / "state").iterdir()) == ["step-000018", "step-000020"]  # the newest two


OPTIMIZERS = ["adamw", "adafactor", "muon", "lion", "prodigy", "schedulefree", "adamw8bit"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_with_the_same_bits_from_files(tmp_path, name):
    module = {
        "schedulefree": "schedulefree",
        "prodigy": "prodigyopt",
        "lion": "lion_pytorch",
        "adamw8bit": "bitsandbytes",
    }
    pytest.importorskip(module.get(name, "torch"))
    config = OptimConfig(optimizer=name, lr=1e-2, weight_decay=0.1, warmup_steps=1)
    names = ["a", "b.c"]

    def make() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        # 64 x 80: bitsandbytes keeps moments of fewer than 4,096 values in 32 bits
        parameters = [torch.nn.Parameter(torch.randn(64, 80, generator=generator)) for _ in names]
        return parameters, make_optimizer(parameters, config)

    def steps(parameters, optimizer, first: int, last: int) -> None:
        for i in range(first, last):
            generator = torch.Generator().manual_seed(i)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole, optimizer = make()
    steps(whole, optimizer, 0, 6)
    broken, optimizer = make()
    steps(broken, optimizer, 0, 3)
    tensors, plain = optimizer_state(optimizer, names)
    parts = {"adapter": dict(zip(names, broken, strict=True)), "optimizer": tensors}
    resume_state.save_state(tmp_path, resume_state.Progress(3), parts, {"optimizer": plain, "identity": {}})
    saved = resume_state.latest_state(tmp_path)
    resumed, optimizer = make()
    for parameter, tensor in zip(resumed, saved.tensors("adapter").values(), strict=True):
        parameter.data = tensor
    restore_optimizer(optimizer, names, saved.tensors("optimizer"), saved.facts["optimizer"])
    steps(resumed, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(tmp_path, whole, cache, toy_model, crash_at):
    cli = Cli(tmp_path)
    (tmp_path / "recipe.toml").write_text((whole / "recipe.toml").read_text().replace('name = "run"', ""))
    crash_at(8, KeyboardInterrupt())
    stopped = cli(app, "run", str(cache), "-r", "recipe.toml")
    assert stopped.code == 130
    root = tmp_path / "runs" / cache.name
    assert "Stopped and saved at step 7. Go on with: k5train resume runs/pictures" in stopped.err
    assert resume_state.latest_state(root / "state").progress.step == 7
    done = cli(app, "run", str(cache), "-r", "recipe.toml")  # the same command goes on by itself
    assert done.code == 0, done.err
    assert "was stopped before its end: going on" in done.err
    assert same(state_of(root), state_of(whole))
    again = cli(app, "resume", str(root))
    assert again.code == 2
    assert "is finished, at step 20" in again.err
    assert "To start another run from its LoRA: k5train run" in again.err  # CONFIG has a cosine


def test_a_run_that_was_told_another_end_still_has_it_after_it_was_stopped_again(tmp_path, cache, toy_model, crash_at):
    config = replace(CONFIG, steps=3, deterministic=True, optim=OptimConfig(lr=1e-2, lr_scheduler="constant"))
    start_run(tmp_path / "run", cache, toy_model, config)
    cli = Cli(tmp_path)
    options = ("--set", "train.steps=8", "--set", "train.deterministic=false")
    refused = cli(app, "resume", "run", *options, "--set", "train.seed=7")  # and what is refused changes nothing
    assert refused.code == 2
    assert "train.seed" in refused.err
    assert "is finished, at step 3" in cli(app, "resume", "run").err
    crash_at(3, KeyboardInterrupt())
    stopped = cli(app, "resume", "run", *options)
    assert "Stopped and saved at step 5. Go on with: k5train resume run" in stopped.err
    done = cli(app, "resume", "run")
    assert done.code == 0, done.err
    assert "Trained 8 steps" in done.out


def test_a_run_that_ended_by_its_time_or_patience_says_so_and_goes_on_with_more(tmp_path, cache, toy_model):
    cli = Cli(tmp_path)
    start_run(tmp_path / "hours", cache, toy_model, replace(CONFIG, steps=6, max_hours=1e-9))
    ended = cli(app, "resume", "hours")
    assert ended.code == 2
    assert "stopped at train.max_hours=1e-09, after" in ended.err
    assert "k5train resume hours --set train.max_hours=2e-09" in ended.err
    validation = replace(CONFIG.validation, split=0.2, held_out_every=1, held_out_sigmas=1, patience=1)
    start_run(tmp_path / "patient", cache, toy_model, replace(CONFIG, steps=6, validation=validation))
    folder = resume_state.latest_state(tmp_path / "patient" / "state").folder
    document = unseal((folder / "step.json").read_bytes())
    # Written by hand, because whether patience ends this run depends on the toy.
    document["progress"] |= {"step": 4, "not_better": 1}
    (folder / "step.json").write_bytes(seal(document))
    folder.rename(folder.with_name("step-000004"))
    ended = cli(app, "resume", "patient")
    assert "stopped early at step 4: the held-out loss did not improve in the last measurement" in ended.err
    assert "--set train.validation.patience=0" in ended.err


def test_a_signal_during_an_update_waits_for_its_end():
    order = []

    def work() -> None:
        with interrupt.installed():
            with interrupt.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                order.append("the update went on")
            order.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert order == ["the update went on"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_trains_on_for_more_steps(tmp_path, cache, toy_model):
    optim = OptimConfig(lr=1e-2, warmup_steps=0)  # a constant rate: four steps begin as two steps do
    start_run(tmp_path / "four", cache, toy_model, replace(CONFIG, steps=4, optim=optim))
    start_run(tmp_path / "two", cache, toy_model, replace(CONFIG, steps=2, optim=optim))
    done = Cli(tmp_path)(app, "resume", "two", "--set", "train.steps=4")
    assert done.code == 0, done.err
    assert same(state_of(tmp_path / "two"), state_of(tmp_path / "four"))
    assert "steps = 4" in (tmp_path / "two" / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "train.seed: 42, now 7"),
        ({"lora": LoraConfig(rank=4, targets=("qkv",), dropout=0.1)}, "train.lora.rank: 2, now 4"),
        ({"objective": ObjectiveConfig(weighting="bell")}, 'train.objective.weighting: "none", now "bell"'),
    ],
)
def test_a_changed_recipe_is_refused_by_the_name_of_its_field(whole, change, named):
    before = (whole / "result.json").read_bytes()
    with pytest.raises(RunError, match="was started differently") as caught:
        go_on(whole, steps=30, **change)
    assert named in caught.value.problem
    assert (whole / "result.json").read_bytes() == before


def test_a_cache_whose_rows_changed_is_refused_in_words(whole, cache, monkeypatch):
    monkeypatch.setattr(identity, "_rows", lambda cache: "another hash")
    with pytest.raises(RunError, match="cache: its images or captions have changed since the run started") as caught:
        go_on(whole, steps=30)
    assert "-o OTHER" in caught.value.fix


SCHEDULES = ["linear", "polynomial", "rex", "cosine_with_restarts"]


@pytest.mark.parametrize("schedule", ["cosine", *(pytest.param(name, marks=pytest.mark.long) for name in SCHEDULES)])
def test_another_last_step_is_refused_under_a_schedule_that_falls_towards_it(tmp_path, cache, toy_model, schedule):
    optim = OptimConfig(lr_scheduler=schedule, warmup_steps=0)
    start_run(tmp_path / "run", cache, toy_model, replace(CONFIG, steps=1, optim=optim))
    cli = Cli(tmp_path)
    refused = cli(app, "resume", "run", "--set", "train.steps=3")
    assert refused.code == 2
    assert "was started differently: train.steps: 1, now 3" in refused.err
    finished = cli(app, "resume", "run")
    assert finished.code == 2
    command = finished.err.split("To start another run from its LoRA: k5train ")[1]  # the advice works
    assert cli(app, *command.split()).code == 0
    assert (tmp_path / "run-2" / "run-2.safetensors").is_file()
    refused = Cli(tmp_path)(app, "resume", "run", "--set", "train.epochs=3")
    assert "train.epochs: not set, now 3" in refused.err


def test_another_last_step_is_refused_where_tread_ramps_down_towards_it(tmp_path, cache, toy_model):
    tread = TreadConfig(routes=(RouteConfig(0.5, 1, 1),), ramp_down=0.5)
    config = replace(CONFIG, steps=1, optim=OptimConfig(warmup_steps=0), tread=tread)
    start_run(tmp_path / "run", cache, toy_model, config)
    with pytest.raises(RunError, match=r"train\.steps: 1, now 3"):
        go_on(tmp_path / "run", steps=3)


def test_another_cache_is_refused_by_what_is_different(tmp_path, whole, toy_model):
    from tests.parity import make_cache

    other = make_cache(tmp_path / "other", toy_model, "fp32", resolution=80)
    refused = Cli(tmp_path)(app, "resume", str(whole), "--cache", str(other), "--set", "train.steps=30")
    assert refused.code == 2
    assert "cache.recipe.selection.resolution: 64, now 80" in refused.err


def test_one_of_several_caches_may_move(tmp_path, cache, toy_model, crash_at):
    for name in ("a", "b"):
        shutil.copytree(cache, tmp_path / name)
    cli = Cli(tmp_path)
    (tmp_path / "recipe.toml").write_text(f"""
[model]
path = "{toy_model}"
[train]
steps = 4
base_model_precision = "no_change"
mixed_precision = "fp32"
device = "cpu"
[train.optim]
warmup_steps = 0
[[train.data]]
cache = "a"
weight = 3.0
[[train.data]]
cache = "b"
weight = 1.0
""")
    crash_at(3, KeyboardInterrupt())
    assert "saved at step 2" in cli(app, "run", "-r", "recipe.toml", "-o", "run").err
    (tmp_path / "b").rename(tmp_path / "c")
    told = cli(app, "resume", "run")
    assert told.code == 2
    assert f"run was trained on {tmp_path / 'b'}, which is not there" in told.err
    command = shlex.split(told.err.split("fill in PATH: ")[1])
    assert command[:3] == ["k5train", "resume", "run"]
    done = cli(app, *(word.replace("PATH", "c") for word in command[1:]))
    assert done.code == 0, done.err
    assert "Trained 4 steps" in done.out


def test_a_run_whose_cache_moved_is_told_where_to_name_it(tmp_path, cache, toy_model):
    shutil.copytree(cache, tmp_path / "here")
    config = replace(CONFIG, steps=1, optim=OptimConfig(warmup_steps=0))
    start_run(tmp_path / "run", tmp_path / "here", toy_model, config)
    (tmp_path / "here").rename(tmp_path / "there")
    cli = Cli(tmp_path)
    refused = cli(app, "resume", "run", "--set", "train.steps=2")
    assert refused.code == 2
    assert "which is not there" in refused.err
    assert "k5train resume run --cache PATH" in refused.err
    done = cli(app, "resume", "run", "--set", "train.steps=2", "--cache", "there")
    assert done.code == 0, done.err


def test_a_state_that_cannot_be_read_is_named(tmp_path, cache, toy_model):
    start_run(tmp_path / "run", cache, toy_model, replace(CONFIG, steps=1, optim=OptimConfig()))
    broken = tmp_path / "run" / "state" / "step-000001" / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(RunError, match=r"optimizer\.safetensors cannot be used: it is not the file that was written"):
        go_on(tmp_path / "run", steps=2)


def test_a_run_that_is_being_trained_is_not_trained_twice(whole):
    with lock_run(Run(whole)), pytest.raises(RunError, match=f"being trained by process {os.getpid()}"):
        go_on(whole, steps=30)


def test_a_kill_while_the_folder_was_being_made_leaves_it_to_the_same_command(tmp_path, cache, toy_model):
    root = tmp_path / "run"
    (root / "checkpoints").mkdir(parents=True)
    (root / "run.json").write_text('{"cache": "cache", "versions": {}}')  # recipe.toml comes last
    for name in ("recipe.toml", "run.json"):
        (root / f".99999999-{name}").mkdir()  # no process has that number
        (root / f".99999999-{name}" / name).write_text("[mo")
    start_run(root, cache, toy_model, replace(CONFIG, steps=1))
    assert not list(root.glob(".9*"))


def test_checkpoints_are_limited_to_the_newest(tmp_path, cache, toy_model):
    start_run(
        tmp_path / "run", cache, toy_model, replace(CONFIG, steps=5, checkpoint_every=1, checkpoints_total_limit=2)
    )
    assert list(Run(tmp_path / "run").checkpoints()) == [4, 5]


@pytest.mark.parametrize("bad", [float("nan"), 25.0])
def test_a_loss_that_is_not_finite_or_explodes_ends_before_the_update_and_names_the_rows(
    tmp_path, cache, toy_model, monkeypatch, bad
):
    normal, seen = step.train_step, []

    def wrong(*args, **kwargs):
        seen.append(1)
        return normal(*args, **kwargs) * 0 + bad if len(seen) > 6 else normal(*args, **kwargs)

    monkeypatch.setattr(step, "train_step", wrong)
    with pytest.raises(RunError, match=r"The loss is (nan|25) at .*\.png; nothing was updated"):
        start_run(tmp_path / "run", cache, toy_model, CONFIG)
    last = metrics_of(tmp_path / "run")[-1]
    assert last["loss"] < 20


def test_gradients_that_are_not_finite_end_before_the_update(tmp_path, cache, toy_model, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(RunError, match=r"gradients' norm is nan at .*\.png; nothing was updated"):
        start_run(tmp_path / "run", cache, toy_model, CONFIG)


def test_deterministic_kernels_are_asked_for_while_a_run_trains_and_not_after(tmp_path, cache, toy_model, monkeypatch):
    asked, normal = [], step.train_step

    def look(*args, **kwargs):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return normal(*args, **kwargs)

    monkeypatch.setattr(step, "train_step", look)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    start_run(tmp_path / "on", cache, toy_model, replace(CONFIG, steps=1, deterministic=True))
    assert set(asked) == {True}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    asked.clear()
    start_run(tmp_path / "off", cache, toy_model, replace(CONFIG, steps=1))
    assert set(asked) == {False}


def test_epochs_and_hours_end_a_run_too(tmp_path, cache, toy_model):
    result = start_run(tmp_path / "epochs", cache, toy_model, replace(CONFIG, epochs=1))
    assert (result.steps, result.ended_by) == (4, "steps")  # six rows in three buckets, two a batch: four batches
    result = start_run(tmp_path / "hours", cache, toy_model, replace(CONFIG, max_hours=1e-9))
    assert (result.steps, result.ended_by) == (0, "max_hours") or result.steps < 3
    written = json.loads((tmp_path / "hours" / "result.json").read_text())
    assert written["ended_by"] == "max_hours"


def test_what_killed_processes_left_in_a_run_is_removed_and_what_is_not_ours_stays(tmp_path, cache, toy_model):
    root = tmp_path / "run"
    start_run(root, cache, toy_model, replace(CONFIG, steps=1, optim=OptimConfig()))
    dead = 2**22 + 1  # above the largest process id
    folders = [root, root / "checkpoints", root / "samples"]
    for folder in folders:
        (folder / f".{dead}-x.safetensors").mkdir()
        (folder / f".{dead}-x.safetensors" / ".tmpAbCdEf").touch()  # what safetensors itself leaves
        (folder / f".{dead}-notes").mkdir()
        (folder / f".{dead}-notes" / "of a user").touch()
    (root / "state" / ".tmp-step-000002").mkdir()
    (root / "state" / ".tmp-step-000002" / "adapter.safetensors").touch()
    go_on(root, steps=2)
    left = sorted(str(path.relative_to(root)) for path in root.rglob(".*") if path.name != ".lock")
    assert left == sorted(str((folder / f".{dead}-notes").relative_to(root)) for folder in folders)


def test_a_folder_that_appears_is_durable_in_the_one_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "runs" / "run" / "state")
    assert set(synced) == {tmp_path, tmp_path / "runs", tmp_path / "runs" / "run"}
    files.make_folder(tmp_path / "runs" / "run" / "state")
    assert len(synced) == 3


def test_a_state_is_durable_before_the_one_before_it_goes(tmp_path, monkeypatch):
    """The order in which a power cut can undo what was done."""
    done = []
    for name in ("sync_file", "sync_folder"):
        monkeypatch.setattr(resume_state, name, lambda path: done.append(("sync", path.name)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: done.append(("rename", to.name)) or rename(self, to))
    facts = {"optimizer": {}, "identity": {}}
    for number in (1, 2, 3):
        done.clear()
        resume_state.save_state(tmp_path / "state", resume_state.Progress(number), {"adapter": {}}, facts)
    assert done == [
        ("sync", "adapter.safetensors"), ("sync", "step.json"), ("sync", ".tmp-step-000003"),
        ("rename", "step-000003"), ("sync", "state"), ("rename", ".tmp-old-step-000001"),
    ]  # fmt: skip


def test_a_run_whose_version_had_fewer_options_goes_on_with_their_defaults_and_with_nothing_else():
    later = {
        "objective": ("sigma_min", "sigma_max", "preservation_weight"),
        "lora": ("decompose_factor",),
        "validation": ("probe_images",),
        "data": ("repeats_by_folder",),
    }
    config = replace(CONFIG, data=(DataConfig("a"),), objective=ObjectiveConfig(sigma_min=0.25))
    before = to_dict(replace(config, objective=ObjectiveConfig()))
    for table, names in later.items():
        for name in names:
            for values in before[table] if table == "data" else [before[table]]:
                values.pop(name, None)
    saved = SavedState(Path("runs/x/state/step-3"), Progress(3), {"identity": {"train": before}}, None)
    identity.check_same(saved, {"train": to_dict(replace(config, objective=ObjectiveConfig()))})
    with pytest.raises(RunError, match=r"started differently: train\.objective\.sigma_min: 0\.0, now 0\.25\n"):
        identity.check_same(saved, {"train": to_dict(config)})
