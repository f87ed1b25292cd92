"""Runs beside each other: what differs, which losses and pictures may be compared, and which run is best."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from k5cache.shared.errors import RunError
from k5cache.shared.model import ModelConfig
from k5cache.shared.sealed import write_sealed
from k5train.cli import app
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.pictures.compared import compare_pictures
from k5train.pictures.comparison import _curves, draw
from k5train.pictures.saved import save_pictures
from k5train.runs.compared import Comparison, compare, remarks
from k5train.runs.compared_panels import MOST_LINES, lines_of
from k5train.runs.folder import Run, create_run
from k5train.runs.metrics import Metrics
from k5train.runs.panels import GREY
from k5train.runs.record import read_record
from tests.cli import Cli

CONFIG = TrainConfig(steps=4, validation=ValidationConfig(prompts=("a fox", "an owl"), split=0.1))
DRAWN = {"prompts": ["a fox", "an owl"], "negative_prompt": "", "width": 16, "height": 16, "num_inference_steps": 2,
         "guidance_scale": 1.0, "seed": 42}  # fmt: skip


def make(
    root: Path, held_out: tuple[float, ...] = (0.5, 0.4, 0.45), *, key: str = "0123", ema: float | None = None,
    is_finished: bool = True, seed: int | None = 42, precision: str = "int8-quanto", lr: float | None = None,
    probe: tuple[float, ...] = (), cache: str = "cache/pictures",
) -> Run:  # fmt: skip
    """A run as training leaves it: ``held_out`` is measured before the first step and after every second one."""
    config = replace(CONFIG, name=root.name, base_model_precision=precision, steps=max(1, 2 * len(held_out) - 2))
    if lr is not None:
        config = replace(config, optim=replace(config.optim, lr=lr))
    run = create_run(root, Path(cache), ModelConfig(), config)
    num = max(len(held_out), len(probe))
    with Metrics(run.metrics) as metrics:
        for i in range(num):
            measured: dict[str, object] = {}
            if held_out:
                measured |= {"held_out_loss": held_out[i], "held_out_key": key}
            if probe:
                measured |= {"probe_loss": probe[i], "probe_key": key}
            if ema is not None and i:
                measured["ema_held_out_loss"] = ema
            metrics.write(step=2 * i, **measured)
            for step in (2 * i + 1, 2 * i + 2) if i < num - 1 else ():
                metrics.write(step=step, loss=1.0, seconds=step / 4, peak_reserved_gib=7.5)
    last = 2 * num - 2
    for step, kind in ((0, ""), (last, ""), *([(last, "ema")] if ema is not None else [])):
        if seed is not None:
            pictures = [Image.new("RGB", (16, 16), (60 * step, 0, 0)) for _ in DRAWN["prompts"]]
            save_pictures(run.samples(step) / kind, pictures, {**DRAWN, "seed": seed})
    if is_finished:
        for path in (run.lora, run.best, *([run.ema] if ema is not None else [])):
            path.write_bytes(b"a LoRA")
        write_sealed(run.result, {"lora": run.lora.name, "steps": last, "seconds": 9.0, "ended_by": "steps"})
    return run


@pytest.fixture
def three(tmp_path) -> Path:
    """``good`` has its best in the middle, ``diverged`` ended above its base, ``stopped`` has not ended."""
    make(tmp_path / "good", ema=0.39, lr=1e-4)
    make(tmp_path / "diverged", (0.5, 0.6, 2.56), lr=1e-2)
    make(tmp_path / "stopped", (0.5, 0.48), is_finished=False, lr=1e-4, seed=7)
    return tmp_path


def compared(*folders: Path) -> Comparison:
    return compare(folders)


def test_the_table_has_base_final_and_best_and_names_the_file_that_has_the_best_loss(three):
    done = Cli(three)(app, "compare", "good", "diverged", "stopped", "-o", "out.png")
    assert (done.code, done.err) == (0, "")
    assert [line.rstrip() for line in done.out.splitlines()] == [
        "Settings that differ",
        "                good    diverged  stopped",
        "train.steps     4       4         2",
        "train.optim.lr  0.0001  0.01      0.0001",
        "",
        "Held-out loss, time and memory",
        "run       steps    base   final    best  at      file     EMA  s/step  GiB",
        "good          4  0.5000  0.4500  0.4000   2      best  0.3900    0.62  7.5",
        "diverged      4  0.5000  2.5600  0.5000   0                      0.62  7.5",
        "stopped       2  0.5000  0.4800  0.4800   2  not kept            0.38  7.5",
        "best     good, step 2, held-out loss 0.4000, good/good-best.safetensors",
        "lower    the EMA of good, 0.3900, good/good-ema.safetensors",
        "good: ended above its best",
        "diverged: ended worse than the base",
        "stopped: not finished: step 2 of 2",
        "pictures of 2 runs, on the same noise",
        "no pictures of stopped: it drew with seed 7 instead of 42",
        "Wrote out.png",
        "Next, draw more with the best: k5train sample good --which best",
    ]
    with Image.open(three / "out.png") as sheet:
        assert sheet.width == 1200


def test_json_has_what_the_table_shows_and_writes_no_picture_unasked(three):
    done = Cli(three)(app, "compare", "good", "diverged", "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    good, diverged = document.pop("runs")
    assert document == {
        "settings": {"train.optim.lr": {"good": 1e-4, "diverged": 1e-2}},
        "held_out_groups": [["good", "diverged"]],
        "probe_groups": [],
        "best": {"run": "good", "step": 2, "loss": 0.4, "file": "good/good-best.safetensors"},
        "reason": "",
        "pictures": {
            "columns": ["a fox", "an owl"],
            "rows": [
                {"label": "base model", "run": "good", "step": 0, "kind": "base", "folder": "good/samples/step-000000"},
                {"label": "good", "run": "good", "step": 4, "kind": "run", "folder": "good/samples/step-000004"},
                {"label": "good EMA", "run": "good", "step": 4, "kind": "ema",
                 "folder": "good/samples/step-000004/ema"},
                {"label": "diverged", "run": "diverged", "step": 4, "kind": "run",
                 "folder": "diverged/samples/step-000004"},
            ],
            "left_out": {},
        },
        "png": None,
    }  # fmt: skip
    assert good == {
        "name": "good", "folder": "good", "is_finished": True, "ended_by": "steps", "steps": 4,
        "base": {"step": 0, "loss": 0.5, "file": None},
        "final": {"step": 4, "loss": 0.45, "file": "good/good.safetensors"},
        "best": {"step": 2, "loss": 0.4, "file": "good/good-best.safetensors"},
        "ema": {"step": 4, "loss": 0.39, "file": "good/good-ema.safetensors"},
        "probe": None, "regularisation": None, "seconds": 9.0, "seconds_per_step": 0.625, "peak_gib": 7.5,
        "curves": {"held_out": [[0, 0.5], [2, 0.4], [4, 0.45]], "ema_held_out": [[2, 0.39], [4, 0.39]]},
        "measured_on": {"held_out": "0123"}, "remarks": ["ended above its best"],
    }  # fmt: skip
    assert (diverged["best"], diverged["remarks"]) == (
        {"step": 0, "loss": 0.5, "file": None},
        ["ended worse than the base"],
    )
    assert not list(three.glob("*.png"))


def test_without_an_output_each_comparison_gets_a_picture_of_its_own(three):
    for name in ("compare.png", "compare-2.png"):
        done = Cli(three)(app, "compare", "good")  # one run alone has its base, final and best
        assert f"Wrote {name}" in done.out
        assert (three / name).is_file()


def test_the_best_is_the_final_lora_if_that_has_the_lowest_loss(tmp_path):
    run = make(tmp_path / "run", (0.5, 0.4, 0.3))
    assert read_record(run.root).best == read_record(run.root).final
    assert read_record(run.root).best.file == run.lora
    assert "k5train sample run\n" in Cli(tmp_path)(app, "compare", "run").out


def test_the_loras_of_a_run_are_found_after_its_folder_was_renamed(tmp_path):
    make(tmp_path / "before", ema=0.39).root.rename(tmp_path / "after")
    record = read_record(tmp_path / "after")
    files = [record.lora.name, *(loss.file.name for loss in (record.final, record.best, record.ema))]
    assert files == ["before.safetensors", "before.safetensors", "before-best.safetensors", "before-ema.safetensors"]


def test_losses_of_other_rows_are_drawn_apart_and_no_run_is_called_the_best(tmp_path):
    make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "other", (0.2, 0.1, 0.1), key="4567")
    comparison = compared(tmp_path)
    assert comparison.groups == (("a", "b"), ("other",))
    assert comparison.best is None
    assert comparison.reason == (
        "No run is called the best, because the held-out losses were not measured on the same images in the same way:"
        " 1. a, b; 2. other"
    )
    same = compared(tmp_path / "a", tmp_path / "b")
    assert _curves(comparison, 1200).height == _curves(same, 1200).height  # panels beside each other
    assert same.best == "a"


def test_runs_of_versions_without_keys_are_compared_only_on_one_cache_with_one_split(tmp_path):
    for name, cache in (("a", "cache/x"), ("b", "cache/x"), ("c", "cache/y")):
        run = make(tmp_path / name, cache=cache)
        run.metrics.write_text(run.metrics.read_text().replace(', "held_out_key": "0123"', ""))
    make(tmp_path / "later", cache="cache/x")
    comparison = compared(tmp_path)
    assert comparison.groups == (("a", "b"), ("c",), ("later",))
    assert "because earlier versions did not record what they measured on" in comparison.reason


def test_without_a_split_no_run_is_called_the_best_and_the_lowest_probe_is_named(tmp_path):
    make(tmp_path / "a", (), probe=(0.5, 0.4)), make(tmp_path / "b", (), probe=(0.5, 0.3))
    comparison = compared(tmp_path / "a", tmp_path / "b")
    assert (comparison.best, comparison.probe_groups) == (None, (("a", "b"),))
    assert comparison.reason == (
        "No run is called the best, because a, b held no images out. To compare runs by a held-out loss, train them"
        " with --set train.validation.split=0.1. On images that were trained on, b has the lowest loss, 0.3000"
    )
    assert compared(make(tmp_path / "never", (0.5, 0.6)).root).reason == (
        "No run is called the best: no held-out loss was below the base's"
    )


def test_pictures_share_columns_only_if_prompts_seed_and_settings_are_the_same(tmp_path):
    others = [make(tmp_path / "seed", seed=7), make(tmp_path / "none", seed=None)]
    others += [make(tmp_path / "bf16", precision="no_change"), make(tmp_path / "prompts")]
    runs = [make(tmp_path / "a"), make(tmp_path / "b"), *others]
    for step in (0, 4):
        save_pictures(runs[-1].samples(step), [Image.new("RGB", (16, 16))], {**DRAWN, "prompts": ["a cat"]})
    pictures = compare_pictures(compared(*(run.root for run in runs)).runs)
    assert [row.label for row in pictures.rows] == ["base model", "base of bf16", "a", "b", "bf16"]
    assert pictures.left_out == {
        "none": "it has none that can be read",
        "seed": "it drew with seed 7 instead of 42",
        "prompts": "it drew other prompts",
    }


def test_pairs_stand_between_their_sources_and_targets(tmp_path):
    run = make(tmp_path / "run")
    drawn = {"prompts": ["a.png: blue", "b.png: red"], "pairs": [{"instruction": "k1"}, {"instruction": "k2"}]}
    folders = [
        run.samples(0),
        run.samples(4),
        *(run.root / "samples" / "pairs" / name for name in ("source", "target")),
    ]
    for folder in folders:
        save_pictures(folder, [Image.new("RGB", (16, 16))] * 2, drawn)
    pictures = compare_pictures(compared(run.root).runs)
    assert [row.label for row in pictures.rows] == ["source", "base model", "run", "target"]


def test_a_sweep_stands_for_its_runs_in_the_order_of_their_numbers_and_a_run_counts_once(tmp_path):
    labels = ["lr=3e-05", "lr=0.0001", "rank=2", "rank=16"]
    for label in reversed(labels):
        make(tmp_path / "sweep" / label)
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    make(tmp_path / "rank=2")
    runs = compared(tmp_path / "sweep", tmp_path / "sweep" / "rank=2" / "..", tmp_path / "rank=2").runs
    assert [run.name for run in runs] == [*labels[:2], "sweep/rank=2", "rank=16", f"{tmp_path.name}/rank=2"]


def test_damaged_and_foreign_folders_are_named_while_the_others_are_compared(tmp_path):
    """Each folder beside a whole run, and what is said of it."""
    cut, middle, nan, link, pipe, recipe, result, facts = (
        make(tmp_path / name, (0.5, 0.45, 0.4))
        for name in ("cut", "middle", "nan", "link", "pipe", "recipe", "result", "facts")
    )
    cut.metrics.write_bytes(cut.metrics.read_bytes()[:-9])
    middle.metrics.write_bytes(middle.metrics.read_bytes().replace(b'"loss"', b'"loss', 1))
    with nan.metrics.open("a") as file:
        file.write('{"step": 6, "held_out_loss": NaN, "seconds": "x"}\n{"step": 1%s}\n' % ("0" * 300))
    link.metrics.unlink(), link.metrics.symlink_to("/etc/passwd")
    pipe.metrics.unlink(), os.mkfifo(pipe.metrics)
    text = recipe.root / "recipe.toml"
    text.write_text(text.read_text().replace("rank = 32", "rank = 33"))
    result.result.write_text("{")
    (facts.root / "run.json").unlink()
    make(tmp_path / "lost").metrics.unlink()
    create_run(tmp_path / "zero", Path("c"), ModelConfig(), replace(CONFIG, name="zero"))
    (tmp_path / "notes").mkdir(), (tmp_path / "list.txt").touch()
    make(tmp_path / "whole", (0.5, 0.2, 0.1))
    names = ["whole", *(run.name for run in (cut, middle, nan, link, pipe, recipe, result, facts)), "lost", "zero"]
    done = Cli(tmp_path)(app, "compare", *names, "notes", "list.txt", "--json", "-o", "out.png")
    assert done.code == 0
    assert done.err.splitlines() == [
        f"warning: {name} is not a run, nor a folder that holds runs: it is left out" for name in ("notes", "list.txt")
    ]
    document = json.loads(done.out)
    assert (document["best"]["run"], document["png"]) == ("whole", "out.png")
    assert {run["name"]: run["remarks"] for run in document["runs"]} == {
        "whole": [],
        "cut": [],
        "middle": ["middle/metrics.jsonl, line 2, is not what the run wrote"],
        "nan": ["the last held-out loss is not finite"],
        "link": ["link/metrics.jsonl is a link to /etc/passwd, which is outside link"],
        "pipe": ["pipe/metrics.jsonl is neither a file nor a folder"],
        "recipe": ["recipe/recipe.toml was changed since the run began: train.lora.rank: 32, now 33"],
        "result": ["result/result.json is not the file that was written"],
        "facts": ["facts is not a run: it has no recipe.toml and run.json"],
        "lost": ["There is no longer a file or folder lost/metrics.jsonl"],
        "zero": ["not finished: step 0 of 4"],
    }
    by_name = {run["name"]: run for run in document["runs"]}
    assert by_name["cut"]["final"]["step"] == 2  # the line of step 4 is lost
    assert by_name["nan"]["final"] == {"step": 6, "loss": None, "file": "nan/nan.safetensors"}
    assert document["pictures"]["left_out"] == dict.fromkeys(["link", "pipe", "zero"], "it has none that can be read")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gone"], "There is no gone"),
        (["list.txt"], "There is no run in list.txt"),
        (["empty"], "There is no run in empty"),
        (["run", "-o", "out.jpg"], "out.jpg does not end in .png, and that is what is written"),
        (["run", "-o", "empty"], "empty cannot be written: it is a folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_two_lines(tmp_path, arguments, problem):
    make(tmp_path / "run"), (tmp_path / "empty").mkdir(), (tmp_path / "list.txt").touch()
    done = Cli(tmp_path)(app, "compare", *arguments)
    assert (done.code, done.out) == (2, "")
    assert f"error: {problem}" in done.err.splitlines()
    assert not list(tmp_path.glob("*.png"))


def test_names_and_prompts_are_text_and_not_markup_or_orders_to_a_terminal(tmp_path):
    name = "[red]x\x1b[31m\n"
    make(tmp_path / name), make(tmp_path / "plain", seed=7)
    out = Cli(tmp_path)(app, "compare", name, "plain").out
    assert "[red]x\\x1b[31m\\n" in out
    assert "\x1b" not in out
    assert json.loads(Cli(tmp_path)(app, "compare", name, "--json").out)["runs"][0]["name"] == name


def test_a_sheet_of_thirty_runs_shows_the_best_ones_and_says_how_many_more_there_are(tmp_path):
    for i in range(30):
        make(tmp_path / f"run-{i}", (0.5, 0.5 - i / 100))
    comparison = compared(tmp_path)
    best = [f"run-{i}" for i in range(29, 22, -1)]
    assert [run.name for run in comparison.ranked()[:MOST_LINES]] == best
    lines = lines_of(comparison.runs, "held_out", dict.fromkeys(best, "#000000"))
    assert len(lines) == 30
    assert [line.name for line in lines if line.name] == ["23 more", *sorted(best)]
    assert [line.colour for line in lines][:23] == [GREY] * 23
    sheet = draw(comparison, compare_pictures(comparison.runs))
    assert sheet.width <= 2400
    assert sheet.height < 4000
    out = Cli(tmp_path)(app, "compare", ".").out
    assert max(len(line) for line in out.splitlines() if line.startswith("run-")) <= 80
    assert [line.split()[0] for line in out.splitlines() if " 0.5000 " in line][:3] == ["run-29", "run-28", "run-27"]


def test_remarks_say_why_a_run_ended_early(tmp_path):
    run = make(tmp_path / "run", (0.5, 0.45, 0.4))
    for reason, said in (("patience", "stopped early"), ("max_hours", "stopped at train.max_hours")):
        write_sealed(run.result, {"ended_by": reason, "steps": 4})
        assert remarks(read_record(run.root)) == [said]


def test_runs_are_compared_without_torch(three):
    code = (
        "import sys\n"
        "from k5train.cli import app\n"
        "try:\n"
        "    app(['compare', 'good', 'diverged', '-o', 'out.png'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print(sorted({'torch', 'safetensors', 'diffusers', 'pyarrow', 'peft'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=three, env=environment)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr
    assert (three / "out.png").is_file()


def test_a_folder_that_is_missing_names_the_first(tmp_path):
    with pytest.raises(RunError, match=r"There is no .*one"):
        compare([tmp_path / "one", tmp_path / "two"])
