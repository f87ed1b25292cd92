"""Validation: the same pictures and held-out triples at every step and in every run; the best LoRA and patience."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import prompt_library, validation_prompts
from k5train.base.quantize import load_transformer
from k5train.commands.run import print_result
from k5train.data.loader import Loader
from k5train.data.split import split_off, split_rows
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.runs.folder import Run
from k5train.runs.loss_curve import draw_losses
from k5train.runs.resume_state import Progress
from k5train.training import held_out_loss
from k5train.training.held_out_loss import HeldOutLoss, sigmas_of
from k5train.training.result import Result
from k5train.training.start import open_data, with_library
from k5train.training.validation import Validation, _keep_the_best
from tests.parity import PROMPTS
from tests.runs import CONFIG, go_on, metrics_of, start_run

HELD = ValidationConfig(split=0.34, held_out_every=2, held_out_sigmas=2)
DRAWN = ValidationConfig(prompts=PROMPTS[:1], num_inference_steps=1, guidance_scale=1.0, width=32, height=32, every=2)


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache, toy_model) -> Path:
    """A run of six steps with an average, which draws and measures at every second step."""
    root = tmp_path_factory.mktemp("validated") / "run"
    validation = replace(HELD, **{k: v for k, v in vars(DRAWN).items() if v != getattr(ValidationConfig(), k)})
    start_run(root, cache, toy_model, replace(CONFIG, steps=6, checkpoint_every=0, validation=validation))
    return root


def held_out_losses(root: Path) -> dict[int, float]:
    return {row["step"]: row["held_out_loss"] for row in metrics_of(root) if "held_out_loss" in row}


def test_pictures_are_drawn_before_during_and_after_with_a_row_for_the_average(run):
    folders = sorted(str(p.parent.relative_to(run / "samples")) for p in run.glob("samples/**/00.png"))
    assert folders == ["step-000000", "step-000002", "step-000002/ema", "step-000004", "step-000004/ema",
                       "step-000006", "step-000006/ema"]  # fmt: skip
    with Image.open(run / "samples.png") as grid:
        assert grid.height > 7 * 32
        assert np.asarray(grid.convert("RGB")).std() > 5


def test_the_first_row_is_the_base_model_even_where_the_adapter_starts_from_a_lora(tmp_path, run, cache, toy_model):
    lora = replace(CONFIG.lora, init_lora=str(run / "run.safetensors"))
    start_run(tmp_path / "on", cache, toy_model, replace(CONFIG, steps=1, lora=lora, validation=DRAWN))
    first = run / "samples" / "step-000000" / "00.png"
    assert (tmp_path / "on" / "samples" / "step-000000" / "00.png").read_bytes() == first.read_bytes()
    assert (tmp_path / "on" / "samples" / "step-000001" / "00.png").read_bytes() != first.read_bytes()


def test_held_out_rows_are_never_trained_on_and_whole_images(cache):
    data = split_off(open_data(cache, CONFIG), 0.34)
    split = data.sources[0].split
    assert len(split) == 2
    loader = Loader(data, CONFIG, 1.0)
    seen = {row for micro in range(loader.micro_batches(3)) for row in loader.rows_of(micro)}
    assert seen == set(range(6)) - split
    flipped = split_rows(["a", "b", "a", "c", "b"], 0.3)  # rows of one image stay together
    assert flipped in ({0, 2}, {1, 4}, {3})


def test_a_choice_of_rows_hardly_changes_when_images_are_added():
    few = [f"image {i}" for i in range(100)]
    more = [*few, *(f"new {i}" for i in range(10))]
    before, after = split_rows(few, 0.1), split_rows(more, 0.1)
    assert len(before) == 10
    assert len(after & before) >= 8


def test_sigmas_of_a_row_lie_one_in_each_equal_part_and_never_change():
    sigmas = sigmas_of("any key", 5)
    assert [int(s * 5) for s in sigmas] == [0, 1, 2, 3, 4]
    assert sigmas == sigmas_of("any key", 5)
    assert sigmas != sigmas_of("another key", 5)


def test_the_held_out_loss_is_the_flow_matching_loss_written_out(cache, toy_model):
    data = split_off(open_data(cache, CONFIG), 0.2)
    scaling_factor = read_config(toy_model, "vae")["scaling_factor"]
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu").eval()
    measured = HeldOutLoss(data, 2, scaling_factor).measure(partial(predict_velocity, transformer), torch.device("cpu"))
    (item,) = data.sources[0].split
    row = data.first.row(item)
    text, latents = data.first.text(row.caption_keys[0]), data.first.latents(row.latent_key)["mean"].float()
    expected = []
    for i, sigma in enumerate(sigmas_of(row.latent_key, 2)):
        noise = torch.randn(latents.shape, generator=held_out_loss._generator(row.latent_key, "noise", i))
        noisy = (1 - sigma) * latents * scaling_factor + sigma * noise
        with torch.no_grad():
            velocity = predict_velocity(transformer, noisy[None, None], torch.tensor([sigma]),
                                        text.prompt_embeds[None], text.pooled[None])  # fmt: skip
        expected.append(((velocity[0, 0] - (noise - latents * scaling_factor)) ** 2).mean().item())
    assert measured == pytest.approx(expected, rel=1e-6)  # the same float32 sums in another order


def test_the_key_of_a_measurement_tells_rows_and_sigmas_apart_and_nothing_else(run, cache):
    def key(split: float, num_sigmas: int) -> str:
        return HeldOutLoss(split_off(open_data(cache, CONFIG), split), num_sigmas, 1.0).key

    assert key(0.2, 2) == key(0.2, 2)
    assert len({key(0.2, 2), key(0.34, 2), key(0.2, 3)}) == 3
    (written,) = {row["held_out_key"] for row in metrics_of(run) if "held_out_loss" in row}
    assert len(written) == 16


def test_metrics_hold_the_held_out_loss_by_sigma_and_the_best_lora_is_kept(run):
    rows = [row for row in metrics_of(run) if "held_out_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert all(len(row["held_out_by_sigma"]) == 2 for row in rows)
    losses = held_out_losses(run)
    result = json.loads((run / "result.json").read_text())
    assert result["best_step"] == min(losses, key=losses.get)
    assert result["best_loss"] == min(losses.values())
    assert Run(run).best.is_file() == bool(result["best_step"])


def test_before_the_first_step_there_is_no_best_lora():
    progress, saved = Progress(), []
    for step, loss in ((0, 0.5), (1, 0.6), (2, 0.5), (3, 0.4), (4, 0.41)):
        progress.step = step
        _keep_the_best(loss, progress, lambda at=step: saved.append(at))
    assert (saved, progress.best_step, progress.not_better) == ([3], 3, 1)


def test_the_best_lora_is_that_of_its_step(tmp_path, cache, toy_model):
    optim = OptimConfig(lr=1e-2, warmup_steps=0)
    validation = replace(HELD, held_out_every=1)
    config = replace(CONFIG, steps=4, checkpoint_every=1, optim=optim, validation=validation)
    start_run(tmp_path / "run", cache, toy_model, config)
    run = Run(tmp_path / "run")
    best = json.loads(run.result.read_text())["best_step"]
    assert best > 0  # the toy learns
    best_lora, step = load_file(run.best), load_file(run.checkpoint(best))
    assert all(torch.equal(best_lora[name], step[name]) for name in best_lora)


def test_patience_ends_a_run_whose_held_out_loss_no_longer_falls(tmp_path, cache, toy_model):
    validation = replace(HELD, held_out_every=1, patience=2)
    optim = OptimConfig(lr=0.3, warmup_steps=0, max_grad_norm=0)  # far too high
    config = replace(CONFIG, validation=validation, optim=optim, loss_limit=0)
    result = start_run(tmp_path / "run", cache, toy_model, config)
    assert result.ended_by == "patience"
    losses = held_out_losses(tmp_path / "run")
    assert result.steps == result.best_step + 2 == max(losses)
    assert min(losses[result.steps], losses[result.steps - 1]) >= losses[result.best_step]


RESULT = Result(
    Path("runs/a/a.safetensors"), "a call", Path("runs/a/samples.png"), 9, 0.5, 0.6, 1.0, "steps", 3, 0.41, 1.0,
    base_held_out_loss=0.45, held_out_loss=0.412,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),  # it lost a twentieth of what the best gained
        ({"held_out_loss": 0.41, "best_step": 9}, None),
        (
            {"held_out_loss": 0.42},
            "ended worse than it was before: held-out loss 0.4200. Use runs/a/a-best.safetensors",
        ),
        ({"held_out_loss": 2.56}, "ended worse than it began: held-out loss 2.5600, 0.4500 before the first step. Use"),
        ({"held_out_loss": None}, "is not a finite number. Use runs/a/a-best.safetensors, which has 0.4100"),
        ({"ema_held_out_loss": 0.3}, "ended worse than its average: held-out loss 0.4120. Use runs/a/a-ema"),
        (
            {"ema_held_out_loss": 0.4, "held_out_loss": 0.43},
            "ended worse than it was before: held-out loss 0.4300. Use runs/a/a-ema.safetensors, which has 0.4000",
        ),
        ({"best_step": 0, "best_loss": 0.45, "held_out_loss": 0.6}, "never below the 0.4500 of before the first step"),
        # Of an earlier version, which measured no base apart.
        ({"best_step": 0, "base_held_out_loss": None}, "never below the 0.4100 of before the first step"),
        ({"base_held_out_loss": None, "held_out_loss": 0.5}, "worse than it was before: held-out loss 0.5000. Use"),
        # Nothing was held out.
        (dict.fromkeys(("best_step", "best_loss", "base_held_out_loss", "held_out_loss")), None),
    ],
)
def test_a_run_says_which_of_its_files_to_use_if_it_is_not_the_finished_lora(capsys, changes, warning):
    print_result(replace(RESULT, **changes))
    said = " ".join(capsys.readouterr().err.split())
    assert (warning in said) if warning else not said


def test_a_run_ends_by_saying_the_loss_of_the_base_the_last_step_and_the_best(capsys):
    print_result(replace(RESULT, ema_held_out_loss=0.42, base_probe_loss=0.5, probe_loss=0.25))
    lines = capsys.readouterr().out.splitlines()
    assert "held out base 0.4500, final 0.4120, best 0.4100 at step 3" in lines
    assert "best     runs/a/a-best.safetensors, step 3, held-out loss 0.4100" in lines
    assert "EMA      runs/a/a-ema.safetensors, held-out loss 0.4200" in lines
    assert any(line.startswith("probe    base 0.5000, final 0.2500") for line in lines)
    nothing = dict.fromkeys(("best_step", "best_loss", "base_held_out_loss", "held_out_loss"))
    print_result(replace(RESULT, **nothing))
    assert "held" not in capsys.readouterr().out
    print_result(replace(RESULT, best_step=0))
    assert "a-best" not in capsys.readouterr().out  # the untrained adapter


def test_validation_changes_no_bit_of_the_training(tmp_path, cache, toy_model, run):
    validation = replace(HELD, held_out_every=0)
    start_run(tmp_path / "run", cache, toy_model, replace(CONFIG, steps=6, checkpoint_every=0, validation=validation))
    plain, validated = load_file(tmp_path / "run" / "run.safetensors"), load_file(run / "run.safetensors")
    assert all(torch.equal(plain[name], validated[name]) for name in plain)


def test_the_grid_keeps_the_rows_of_before_a_restart(tmp_path, cache, toy_model):
    optim = OptimConfig(lr=1e-2, warmup_steps=0)
    start_run(tmp_path / "run", cache, toy_model, replace(CONFIG, steps=2, validation=DRAWN, optim=optim))
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        before = grid.height
    go_on(tmp_path / "run", steps=4)
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        assert grid.height > before


def test_a_prompt_library_is_a_list_or_names_and_joins_the_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.json").write_text('{"fox": "a red fox", "lamp": "a lamp"}')
    Path("list.json").write_text('["a lamp"]')
    assert prompt_library(Path("names.json")) == ("a red fox", "a lamp")
    table = {"prompts": ["a lamp"], "prompt_library": "names.json"}
    assert validation_prompts({"train": {"validation": table}}) == ("", "a lamp", "a red fox")
    config = TrainConfig(validation=ValidationConfig(prompts=("a bird",), prompt_library="list.json"))
    resolved = with_library(config).validation
    assert (resolved.prompts, resolved.prompt_library) == (("a bird", "a lamp"), None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        ("[1]", "is not a list of prompts"),
        ("{", "is not JSON"),
        ('{"a": "x", "b": "y", "a": "z"}', "has 2 prompts named 'a'"),
    ],
)
def test_a_prompt_library_that_is_none_is_refused(tmp_path, text, problem):
    if text is not None:
        (tmp_path / "library.json").write_text(text)
    with pytest.raises(RecipeError, match=problem):
        prompt_library(tmp_path / "library.json")


def test_a_split_that_leaves_nothing_is_refused(cache):
    assert "patience needs rows to measure on" in ValidationConfig(patience=2).check()[0]
    with pytest.raises(RecipeError, match="holds out 1 of 1 row"):
        split_off(_OneRow(open_data(cache, CONFIG)), 0.5)


class _OneRow:
    """A mixture of a cache with one image."""

    def __init__(self, data):
        class Cache:
            def __len__(self):
                return 1

            def columns(self, *names):
                return data.first.columns(*names).slice(0, 1)

        self.sources = (replace(data.sources[0], cache=Cache()),)


def test_the_curve_is_drawn_after_the_first_step_and_at_the_end_but_not_after_each(
    tmp_path, cache, toy_model, monkeypatch
):
    nums_rows = []
    monkeypatch.setattr(
        "k5train.training.validation.draw_losses",
        lambda rows, *texts: nums_rows.append(len(rows)) or draw_losses(rows, *texts),
    )
    monkeypatch.setattr("k5train.training.validation.CURVE_SECONDS", 600.0)
    start_run(tmp_path / "run", cache, toy_model, replace(CONFIG, steps=4), is_whole=True)
    assert nums_rows == [1, 4]


def test_a_step_in_which_nothing_is_saved_does_not_read_the_recipe(tmp_path, cache, toy_model, monkeypatch):
    names = []
    monkeypatch.setattr("k5train.runs.folder._earlier_names", lambda root: names.append(root.name) or ())
    for steps in (2, 6):
        start_run(tmp_path / f"{steps}", cache, toy_model, replace(CONFIG, steps=steps, checkpoint_every=0))
    assert names.count("6") == names.count("2")


def test_a_curve_that_takes_long_is_drawn_less_often(tmp_path, monkeypatch):
    validation = Validation.__new__(Validation)
    validation.run, validation._objective = Run(tmp_path), ""
    validation.run.metrics.write_text('{"step": 1, "loss": 0.5}\n')
    now = iter([50.0, 50.25])  # it begins, and ends a quarter of a second later
    monkeypatch.setattr("k5train.training.validation.time", SimpleNamespace(monotonic=lambda: next(now)))
    validation._draw_curve()
    assert validation._curve_due_at == 50.25 + 25
