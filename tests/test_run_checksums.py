"""Is every changed byte of a run found before it is used, and does the run go on without what is damaged?"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import RunError
from k5cache.shared.sealed import seal, unseal
from k5train.cli import app
from k5train.pictures.saved import read_pictures, save_pictures
from k5train.runs import written
from k5train.runs.folder import Run
from k5train.runs.metrics import Metrics, check_metrics, read_metrics
from k5train.runs.record import UNSEALED_RESULT
from k5train.runs.resume_state import latest_state
from k5train.runs.written import check_recorded
from k5train.training.session import Session
from k5train.training.sweep import sweep
from k5train.training.sweep_runs import SweepRun
from tests.cli import Cli
from tests.runs import CONFIG, go_on, lora_of, metrics_of, numbers, only_training, same, start_run, state_of

SIX = replace(CONFIG, steps=6, checkpoint_every=2, optim=replace(CONFIG.optim, lr_scheduler="constant", warmup_steps=0))


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, toy_model) -> Path:
    """Six steps with a state and a checkpoint every two. Tests only read it."""
    root = tmp_path_factory.mktemp("whole") / "run"
    start_run(root, cache, toy_model, SIX)
    return root


@pytest.fixture
def run(tmp_path, whole) -> Path:
    """A copy of it, which a test may damage."""
    return shutil.copytree(whole, tmp_path / "run")


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def flipped(path: Path, count: int, chance: random.Random) -> Iterator[str]:
    """Flip one bit at a time in ``path``, at its ends and at random places, and put it back afterwards."""
    size = path.stat().st_size
    places = [0, 7, 8, size - 1, *(chance.randrange(size) for _ in range(count - 4))]
    for position in places:
        bit = chance.randrange(8)
        flip(path, position, bit)
        yield f"bit {bit} of byte {position} of {path}"
        flip(path, position, bit)


def use_state(root: Path) -> None:
    """All that a resumption reads of a run before it loads the model."""
    saved = latest_state(root / "state")
    assert saved is not None
    saved.check()
    check_metrics(root / "metrics.jsonl", saved.progress.metrics)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_every_flipped_bit_of_a_state_is_named_before_it_is_used(run, count):
    chance = random.Random(3)
    newest = run / "state" / "step-000006"
    files = [*sorted(newest.iterdir()), run / "metrics.jsonl"]
    assert len(files) == 5
    for path in files:
        for where in flipped(path, count, chance):
            with pytest.raises(RunError) as refused:
                use_state(run)
            assert str(path) in refused.value.problem, where
            assert "\n" not in refused.value.problem, where
            fix = "mv" if path.name == "metrics.jsonl" else f"k5train resume {run} --step 4"
            assert fix in refused.value.fix, where
    use_state(run)  # all bits are back


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.long)])
def test_every_flipped_bit_of_a_saved_lora_is_named_before_it_is_used(run, count):
    chance = random.Random(4)
    loras = [*Run(run).checkpoints().values(), Run(run).lora, Run(run).ema]
    assert [path.name for path in loras] == [
        "step-000002.safetensors", "step-000004.safetensors", "step-000006.safetensors",
        "run.safetensors", "run-ema.safetensors",
    ]  # fmt: skip
    for path in loras:
        assert check_recorded(path)
        for where in flipped(path, count, chance):
            with pytest.raises(RunError, match="is not the file that the run wrote") as refused:
                check_recorded(path)
            assert str(path) in refused.value.problem, where
    for where in flipped(run / written.FILE, count, chance):
        with pytest.raises(RunError, match=r"loras\.json is not the file that was written"):
            check_recorded(loras[0])
        assert where


def test_a_damaged_state_is_refused_by_name_and_the_command_that_is_offered_ends_with_the_same_bits(
    tmp_path, run, whole
):
    cli = Cli(tmp_path)
    path = run / "state" / "step-000006" / "adapter.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 0x10
    path.write_bytes(raw)
    refused = cli(app, "resume", "run", "--set", "train.steps=8")
    assert refused.code == 2
    assert "state/step-000006/adapter.safetensors cannot be used: it is not the file that was written" in refused.err
    command = refused.err.split("go on from the state before it: k5train ")[1].split()
    assert command == ["resume", "run", "--step", "4"]
    done = cli(app, *command)
    assert done.code == 0, done.err
    assert "Going back to step 4: the state of step 6 is removed" in done.err
    assert same(state_of(run), state_of(whole))
    assert same(lora_of(run), lora_of(whole))
    assert numbers(metrics_of(run)) == numbers(metrics_of(whole))


def test_where_no_state_before_it_is_whole_none_is_offered(run):
    for step in (4, 6):
        path = run / "state" / f"step-{step:06d}" / "ema.safetensors"
        flip(path, path.stat().st_size - 1, 0)
    with pytest.raises(RunError, match="step-000006/ema") as refused:
        use_state(run)
    (command,) = refused.value.fix.splitlines()
    cache = json.loads((run / "run.json").read_text())["cache"]
    assert command == f"To train again from the start: k5train run {cache} --recipe {run}/recipe.toml --out {run}-2"


def test_a_step_that_was_edited_is_refused_also_with_a_right_checksum(run):
    path = run / "state" / "step-000006" / "step.json"
    text = path.read_text(encoding="utf-8")
    assert '"step": 6' in text
    path.write_text(text.replace('"step": 6', '"step": 5'), encoding="utf-8")
    with pytest.raises(RunError, match=r"step\.json cannot be used: it is not the file that was written"):
        use_state(run)
    document = unseal(text.encode())
    document["progress"]["step"] = 5
    path.write_bytes(seal(document))
    with pytest.raises(RunError, match="it says step 5, and its folder step 6"):
        use_state(run)


@pytest.mark.parametrize("name", ["adapter.safetensors", "step.json"])
def test_a_missing_file_of_a_state_is_named(run, name):
    (run / "state" / "step-000006" / name).unlink()
    with pytest.raises(RunError, match=f"step-000006/{name} cannot be used: it is missing"):
        use_state(run)


def as_an_earlier_version_saved_it(root: Path) -> None:
    """Turn the newest state into one without checksums, alone in its folder."""
    shutil.rmtree(root / "state" / "step-000004")
    folder = root / "state" / "step-000006"
    document = unseal((folder / "step.json").read_bytes())
    del document["format"], document["files"], document["progress"]["metrics"]
    (folder / "step.json").unlink()
    (folder / "state.json").write_text(json.dumps(document), encoding="utf-8")
    (root / written.FILE).unlink()


def test_a_run_of_a_version_without_checksums_goes_on_and_says_that_they_are_missing(tmp_path, run, whole, capsys):
    as_an_earlier_version_saved_it(run)
    again = shutil.copytree(whole, tmp_path / "again" / "run")
    assert not check_recorded(Run(run).lora)
    go_on(run, steps=8)
    assert "is of an earlier version, without checksums: it is used as it is" in capsys.readouterr().err
    go_on(again, steps=8)
    assert same(state_of(run), state_of(again))
    assert numbers(metrics_of(run)) == numbers(metrics_of(again))
    assert check_recorded(Run(run).lora)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"progress": 3}', '{"progress": {"step": 6}}'])
def test_a_damaged_state_of_a_version_without_checksums_is_named_too(run, text):
    as_an_earlier_version_saved_it(run)
    (run / "state" / "step-000006" / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"state\.json cannot be used"):
        use_state(run)


def test_lines_after_the_saved_state_are_dropped_and_never_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.write(step=0, held_out_loss=1.0)
        metrics.write(step=1, loss=0.5)
        saved = metrics.written()
        metrics.write(step=1, held_out_loss=0.9)  # a kill comes before this is in a state
        metrics.write(step=2, loss=0.4)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 1, 2]
    with Metrics(path, 1, written=saved) as metrics:
        metrics.write(step=1, held_out_loss=0.9)
    assert [(row["step"], len(row)) for row in read_metrics(path)] == [(0, 2), (1, 2), (1, 2)]
    with Metrics(path) as metrics:  # killed before the first state: the run begins again
        metrics.write(step=0, held_out_loss=1.0)
    assert path.read_text() == '{"step": 0, "held_out_loss": 1.0}\n'


@pytest.mark.parametrize("line", ["{", "3", '{"stfp": 2}', '{"step": 2, "loss": "x"}', "\udcff", "[" * 100_000])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    lines = f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 3, "loss": 0.5}}\n'
    path.write_bytes(lines.encode("utf-8", "surrogateescape"))
    for read in (read_metrics, lambda p: check_metrics(p, None)):
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2, is not what the run wrote"):
            read(path)


def test_without_its_metrics_a_run_goes_on(run, capsys):
    (run / "metrics.jsonl").unlink()
    go_on(run, steps=8)
    assert "it will have the steps from 7 on" in capsys.readouterr().err
    assert [row["step"] for row in metrics_of(run)] == [7, 8]


def test_a_lora_of_a_run_that_has_changed_is_refused_by_every_command_that_reads_it(tmp_path, run, toy_model):
    cli = Cli(tmp_path)
    good = cli(app, "check-lora", "run/run.safetensors", "--model", str(toy_model))
    assert good.code == 0, good.err
    assert "It is the file that its run wrote" in good.err
    lora = run / "run.safetensors"
    save_file({name: t * 1.5 for name, t in load_file(lora).items()}, lora)
    (tmp_path / "start.toml").write_text((run / "recipe.toml").read_text(), encoding="utf-8")
    for command in (
        ["check-lora", "run/run.safetensors", "--model", str(toy_model)],
        ["export", "run/run.safetensors", "-o", "x.safetensors", "--model", str(toy_model)],
        ["merge", "run/run.safetensors", "run/run-ema.safetensors", "-o", "x.safetensors", "--model", str(toy_model)],
        ["sample", "run", "-p", ""],
        ["run", "-r", "start.toml", json.loads((run / "run.json").read_text())["cache"], "-o", "next",
         "--set", 'train.lora.init_lora="run/run.safetensors"', "--set", 'train.name="next"'],
    ):  # fmt: skip
        refused = cli(app, *command)
        assert refused.code == 2, (command, refused.out, refused.err)
        assert "run/run.safetensors is not the file that the run wrote: its checksum does not match" in refused.err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_run_that_is_moved_while_it_is_trained_begins_no_second_folder(run, monkeypatch):
    original = Session.update
    away = run.with_name("away")

    def update(*args):
        if run.exists():
            run.rename(away)
        return original(*args)

    with monkeypatch.context() as moving:
        moving.setattr(Session, "update", update)
        with pytest.raises(FileNotFoundError, match=r"run/run\.json"):
            go_on(run, steps=8, checkpoint_every=1)
    assert not run.exists()
    away.rename(run)
    go_on(run, steps=8)
    assert [row["step"] for row in metrics_of(run) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_damaged_list_of_checksums_is_begun_anew_with_a_warning(run, capsys):
    flip(run / written.FILE, 100, 0)
    go_on(run, steps=7)
    assert "loras.json is not the file that was written: it is begun anew" in capsys.readouterr().err
    assert check_recorded(Run(run).lora)
    assert not check_recorded(Run(run).checkpoint(2))


def test_a_kill_between_a_lora_and_its_checksum_leaves_a_lora_that_is_accepted(run):
    lora = Run(run).lora
    before = lora.read_bytes()
    with written.recorded(run, lora) as record:
        new = run / "new"
        new.write_bytes(before + b"\0")
        record(new)
        assert check_recorded(lora)  # a kill here: the file before it
        new.replace(lora)
        assert check_recorded(lora)  # or here: the new one
    assert check_recorded(lora)
    lora.write_bytes(before)
    with pytest.raises(RunError, match="is not the file that the run wrote"):
        check_recorded(lora)


def test_a_sweep_names_a_finished_run_whose_lora_has_changed(tmp_path, cache, toy_model):
    from k5cache.shared.model import ModelConfig

    runs = [SweepRun(name, replace(SIX, steps=1, seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    model = ModelConfig(path=str(toy_model))
    with only_training():
        sweep(cache, tmp_path / "sweep", model, runs)
    lora = tmp_path / "sweep" / "a" / "a.safetensors"
    flip(lora, lora.stat().st_size - 1, 3)
    result = tmp_path / "sweep" / "b" / "result.json"
    result.write_text(re.sub(r'"last_loss": (\d)', r'"last_loss": 1\1', result.read_text()), encoding="utf-8")
    outcomes = sweep(cache, tmp_path / "sweep", model, runs).outcomes
    assert "a.safetensors is not the file that the run wrote" in outcomes[0].problem
    assert "result.json is not the file that was written. To train it again, move" in outcomes[1].problem
    document = {name: value for name, value in json.loads(result.read_text()).items() if name in UNSEALED_RESULT}
    result.write_text(json.dumps(document), encoding="utf-8")  # as an earlier version wrote it
    outcomes = sweep(cache, tmp_path / "sweep", model, runs).outcomes
    assert outcomes[1].last_loss == document["last_loss"]


def test_a_sample_picture_that_has_changed_is_left_out_of_the_grid_with_a_warning(tmp_path, capsys):
    drawn = {"prompts": ["a", "b"], "seed": 1}
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    save_pictures(tmp_path / "new", pictures, drawn)
    save_pictures(tmp_path / "old", pictures, drawn)  # earlier versions saved no checksums
    (tmp_path / "old" / "drawn.json").write_text(json.dumps(drawn), encoding="utf-8")
    for name in ("new", "old"):
        assert [p.tobytes() for p in read_pictures(tmp_path / name, drawn)] == [p.tobytes() for p in pictures]
        assert read_pictures(tmp_path / name, {**drawn, "seed": 2}) is None
    assert read_pictures(tmp_path / "none", drawn) is None
    assert capsys.readouterr().err == ""
    chance = random.Random(5)
    for path in [tmp_path / "new" / name for name in ("00.png", "01.png", "drawn.json")]:
        for where in flipped(path, 20, chance):
            assert read_pictures(tmp_path / "new", drawn) is None, where
            assert f"{path} is not what the run drew" in capsys.readouterr().err.replace("\n", ""), where
    for damage in (b"", b"\x89PNG\r\n\x1a\n", (tmp_path / "old" / "00.png").read_bytes()[:40]):
        (tmp_path / "old" / "00.png").write_bytes(damage)
        assert read_pictures(tmp_path / "old") is None
    (tmp_path / "new" / "01.png").unlink()
    assert read_pictures(tmp_path / "new") is None
