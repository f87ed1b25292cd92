"""Does the trial of precisions compare runs that differ in nothing else, and decide by the rule that it states?"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from k5cache.shared.errors import RunError
from pipelines.measure import judged
from pipelines.measure.precision import __main__ as command
from pipelines.measure.precision import trial
from pipelines.measure.precision.verdict import Compared, Distances, Verdict, compared, distances
from pipelines.measure.settings.trial import Place
from tests import micro

QUANTO, DYNAMIC = "int8-quanto", "int8-dynamic"


def test_the_interval_is_that_of_a_paired_t_test_in_spreads_of_seeds():
    quanto = {"lines": {0: 0.80, 1: 0.81, 2: 0.82, 3: 0.83, 4: 0.84, 9: 5.0}}  # the last has no partner
    dynamic = {"lines": {0: 0.801, 1: 0.810, 2: 0.822, 3: 0.829, 4: 0.843}}
    result = compared(dynamic, quanto)
    # scipy.stats.ttest_rel of the shares: mean 0.001, 95 % from -0.00096 to 0.00296; statistics.stdev: 0.0158114.
    assert result.num_pairs == 5
    assert result.mean == pytest.approx(0.001 / 0.0158114, rel=1e-4)
    assert result.half_width == pytest.approx(0.0019630 / 0.0158114, rel=1e-3)
    assert result.by_concept == {"lines": result.mean}
    two = compared({**dynamic, "mosaic": {0: 0.5, 1: 0.7}}, {**quanto, "mosaic": {0: 0.4, 1: 0.6}})
    assert two.num_pairs == 7
    assert two.by_concept["mosaic"] == pytest.approx(0.1 / 0.141421, rel=1e-4)  # by its own spread
    with pytest.raises(ValueError, match="mosaic needs at least two seeds"):
        compared({"mosaic": {0: 0.5}}, {"mosaic": {0: 0.4, 1: 0.6}})


def test_pictures_of_a_pair_are_held_against_those_of_two_seeds():
    quanto = {0: [0, 0], 1: [3, 4], 2: [0, 0]}
    result = distances({0: [0, 10], 1: [3, 4], 2: [0, 0]}, quanto)
    assert result.of_pairs == pytest.approx(50**0.5 / 3)
    assert result.of_seeds == pytest.approx(2 * 12.5**0.5 / 3)
    with pytest.raises(ValueError, match="at least two seeds"):
        distances({0: [0, 0]}, quanto)


@pytest.mark.parametrize(
    ("changes", "is_alike"),
    [
        ({}, True),
        ({"learned": Compared({"lines": 0.1}, 0.6, 0.4, 15)}, False),  # up to 1.0: not excluded
        ({"forgot": Compared({"lines": 1.1, "mosaic": -1.0}, 0.0, 0.2, 15)}, False),  # in one concept
        ({"forgot": Compared({"lines": -3.0}, -3.0, 0.2, 15)}, True),  # better is no objection
        ({"mosaic": Distances(9.1, 9.0)}, False),
    ],
)
def test_each_part_of_the_rule_decides(changes, is_alike):
    near = Compared({"lines": 0.1, "mosaic": 0.2}, 0.1, 0.4, 15)
    losses = {name: changes.get(name, near) for name in ("learned", "forgot")}
    pictures = {name: changes.get(name, Distances(5.0, 9.0)) for name in ("lines", "mosaic")}
    verdict = Verdict(losses, pictures)
    assert verdict.is_alike is is_alike
    assert ("Verdict: no difference beyond" in str(verdict)) is is_alike


def test_arms_differ_in_the_precision_alone_and_both_int8_come_first(tmp_path):
    place = Place(tmp_path)
    quanto, dynamic, bf16 = (trial.config_of(arm, "lines", 3, place, "cuda", 400) for arm in trial.ARMS)
    assert replace(dynamic, base_model_precision=QUANTO) == replace(bf16, base_model_precision=QUANTO) == quanto
    assert (quanto.seed, quanto.steps, quanto.mixed_precision, quanto.optim.lr) == (3, 400, "bf16", 1e-4)
    jobs = trial.jobs(5, ("lines", "mosaic", "creature"))
    assert len(jobs) == len(set(jobs)) == 45
    assert jobs[:4] == [(QUANTO, "lines", 0), (DYNAMIC, "lines", 0), (QUANTO, "mosaic", 0), (DYNAMIC, "mosaic", 0)]
    assert {arm for arm, _, _ in jobs[:30]} == {QUANTO, DYNAMIC}


def test_a_lora_is_judged_on_the_weights_that_are_not_quantised(once, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        judged, "load_transformer", lambda folder, precision, dtype, device: seen.append((precision, dtype))
    )
    with pytest.raises(AttributeError):  # None is no transformer
        judged.with_lora(micro.MODEL, None, "cpu", "no_change")
    monkeypatch.setattr(judged, "with_lora", lambda *arguments: seen.append(arguments[-1]))
    monkeypatch.setattr(judged, "open_cache", lambda cache: [])
    monkeypatch.setattr(judged, "Mixture", lambda sources: None)
    monkeypatch.setattr(judged.HeldOutLoss, "__init__", lambda *arguments: None)
    monkeypatch.setattr(judged.HeldOutLoss, "measure", lambda *arguments: [1.0, 2.0])
    monkeypatch.setattr(judged.sample, "draw", lambda *arguments: [Image.new("RGB", (2, 2), "red")])
    monkeypatch.setattr(judged, "drawings_for", lambda *arguments: [])
    result = trial.of_base(Place(tmp_path), "lines", "cpu")
    assert seen[0][0] == "no_change"
    assert seen[1:] == ["no_change", "no_change"]
    assert result["losses"] == {"held_out": [1.0, 2.0], "known": [1.0, 2.0]}
    assert trial.pictures_of(result)[0].getpixel((1, 1)) == (255, 0, 0)


def test_a_run_that_fails_is_named_and_left_out():
    def fail() -> dict[str, object]:
        raise RunError("the loss is not finite", "Lower the rate")

    assert trial.do(fail) == {"problem": "RunError: the loss is not finite\nLower the rate"}
    results = {
        "base/lines": {"losses": {"known": [2.0, 4.0]}},
        f"{QUANTO}/lines/0": {"losses": {"known": [3.0, 3.3]}},
        f"{QUANTO}/lines/1": trial.do(fail),
        f"{DYNAMIC}/lines/0": {"losses": {"known": [3.0, 3.0]}},
    }
    assert trial.shares(results, QUANTO, "known") == {"lines": {0: pytest.approx(1.05)}}


def test_the_command_prints_table_kernels_and_verdict_of_what_is_done(tmp_path, monkeypatch):
    def drawn(shade: int) -> list[str]:
        texts = []
        for _ in range(2):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (shade, shade, shade)).save(file, "PNG")
            texts.append(base64.b64encode(file.getvalue()).decode())
        return texts

    results = {f"kernels/{arm}": {"_int8_matmul": 96.0, "_scale_rows": 0.0, "other": 9.5} for arm in trial.ARMS}
    results["base/lines"] = {"losses": {"held_out": [1.0], "known": [2.0]}, "pictures": drawn(0)}
    for seed in range(2):
        for i, arm in enumerate(trial.ARMS):
            losses = {"held_out": [0.8 + 0.01 * seed + 0.001 * i], "known": [2.2 + 0.01 * seed]}
            results[f"{arm}/lines/{seed}"] = {"losses": losses, "pictures": drawn(10 * seed + i)}
    out = tmp_path / "precision.json"
    out.write_text(json.dumps({"setting": {"steps": 7, "device": "cpu"}, "results": results}), encoding="utf-8")
    monkeypatch.setattr(trial, "prepare", lambda folder, names: Place(folder))
    app = command.command_line.typer.Typer()
    app.command()(command.main)
    options = ["-o", str(out), "--seeds", "2", "--steps", "7", "--device", "cpu", "--concept", "lines"]
    done = CliRunner().invoke(app, [*options, "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| `int8-dynamic` | 0.8060 ± 0.0071 | 1.1025 ± 0.0035 |" in done.output
    assert "| `int8-quanto` | 96.0 | 0.0 | 0.0 | 9.5 |" in done.output
    assert "pictures of lines: 1.0 apart in a pair, 10.0 between two seeds" in done.output
    assert "Verdict: no difference beyond the spread of seeds" in done.output
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.height > 5 * 128
    del results[f"{DYNAMIC}/lines/1"]
    with pytest.raises(ValueError, match="lines needs at least two seeds"):
        trial.verdict(results)
    assert set(json.loads(out.read_text(encoding="utf-8"))) == {"setting", "results", "machine"}
    refused = CliRunner().invoke(app, [*options, "--steps", "8", "--folder", str(tmp_path)])
    assert "is not from this trial with this setting" in str(refused.exception)


def test_caches_that_are_there_are_not_encoded_again(tmp_path, monkeypatch):
    encoded: list[Path] = []
    monkeypatch.setattr(judged, "encode", lambda pictures, root, *_: encoded.append(pictures))
    (tmp_path / "caches" / "lines-trained").mkdir(parents=True)
    (tmp_path / "caches" / "lines-trained" / "manifest.json").touch()
    trial.prepare(tmp_path, ("lines",))
    assert [folder.name for folder in encoded] == ["known", "held_out"]
    assert len(list(encoded[1].glob("*.png"))) == 12
