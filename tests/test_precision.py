"""Does ``base_model_precision = "auto"`` become what the GPU and the recipe can use, once, and does a run keep it?"""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from k5cache.shared.errors import RunError
from k5cache.shared.model import ModelConfig
from k5train.cli import app
from k5train.configure import implied
from k5train.doctor import probe
from k5train.exact import selftest
from k5train.forward import ops, precision
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.precision import can_be_dynamic, is_open, precision_of, with_precision
from k5train.options.train import TrainConfig
from k5train.runs.folder import create_run, open_run
from k5train.training.start import resume, start
from k5train.training.sweep import decide_together, with_known_precision
from k5train.training.sweep_runs import SweepRun
from k5train.ui.new_run import planner_process
from tests.cli import Cli
from tests.runs import CONFIG, only_training

QUANTO, DYNAMIC = "int8-quanto", "int8-dynamic"
AUTO = TrainConfig(base_model_precision="auto")
SHORT = replace(CONFIG, base_model_precision="auto", steps=1, checkpoint_every=0, name="run")


@pytest.fixture
def gpu(monkeypatch):
    """An RTX 4090 on which the int8 kernel runs, as far as the precision is concerned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(ops, "kernel_works", lambda device: True)
    return monkeypatch


def test_auto_is_int8_dynamic_on_a_gpu_that_runs_the_kernel_and_any_other_precision_stays(gpu):
    assert precision.decided(AUTO).base_model_precision == DYNAMIC
    assert precision.decided(replace(AUTO, lora=LoraConfig(algo="rslora"))).base_model_precision == DYNAMIC
    for given in (QUANTO, DYNAMIC, "no_change"):
        config = TrainConfig(base_model_precision=given)
        assert precision.decided(config) is config
        assert with_precision(config, "no_change") is config
        assert precision_of(config) == given
        assert not is_open(config)
    assert precision_of(AUTO) == QUANTO  # where nobody asked


def test_what_a_failed_check_of_the_kernel_left_in_a_cycle_is_freed_before_collections_leave_it_out(gpu):
    held = []

    def fails(device):
        error = RuntimeError("of ptxas")
        error.tensor, error.itself = torch.zeros(3), error
        held.append(weakref.ref(error.tensor))
        return False

    gpu.setattr(ops, "kernel_works", fails)
    gc.disable()
    try:
        assert precision.chosen([AUTO]) == QUANTO
    finally:
        gc.enable()
    assert held[0]() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoraConfig(algo="dora")},
        {"lora": LoraConfig(algo="lokr")},
        {"mixed_precision": "fp32"},
        {"device": "cpu"},
        {"memory": MemoryConfig(execution="diffusers")},
    ],
)
def test_auto_is_int8_quanto_for_a_recipe_that_int8_dynamic_cannot_train(gpu, changes):
    config = replace(AUTO, **changes)
    assert not can_be_dynamic(config)
    settled = precision.decided(config)
    assert settled.base_model_precision == QUANTO
    assert settled.check() == []


def test_auto_is_int8_quanto_where_the_kernel_does_not_run(gpu):
    gpu.setattr(ops, "kernel_works", lambda device: False)  # torch's own int8 matmul was never timed
    assert precision.chosen([AUTO]) == QUANTO
    gpu.setattr(ops, "kernel_works", lambda device: True)
    gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert precision.chosen([AUTO]) == QUANTO
    gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    gpu.setattr(torch.version, "hip", "6.4")
    assert precision.chosen([AUTO]) == QUANTO


def test_a_plan_for_an_imagined_card_takes_it_for_one_with_int8_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    imagined = replace(AUTO, memory=MemoryConfig(vram="12GB"))
    assert precision.chosen([imagined], is_imagined=True) == DYNAMIC
    assert precision.chosen([imagined]) == QUANTO  # a run, which the CPU would train
    assert precision.chosen([AUTO], is_imagined=True) == QUANTO


def test_everything_that_plans_or_tests_a_recipe_takes_auto_for_what_a_run_would(tmp_path, gpu, toy_model):
    """The command, the page, the doctor, the questions of configure, and the selftest."""
    said: list[TrainConfig] = []

    def end(transformer: object, config: TrainConfig, *_: object) -> None:
        said.append(config)
        raise RunError("seen", "nothing")

    gpu.setattr("k5train.planning.plan.plan_for", end)
    gpu.setattr("k5train.planning.vram.budget", lambda *_: 12 * 2**30)
    gpu.setattr(selftest, "case_of", lambda cache, folder, config, device: end(None, config))
    recipe = '[train]\nbase_model_precision = "auto"\n'
    (tmp_path / "auto.toml").write_text(recipe, encoding="utf-8")
    assert "seen" in Cli(tmp_path)(app, "plan", "-r", "auto.toml", "--no-time").err
    question = planner_process.Question(recipe, (), None, is_timed=False)
    assert planner_process.answer(question) == {"problem": ["seen", "nothing"]}
    gpu.setattr("k5train.options.train.TrainConfig", lambda **given: replace(AUTO, **given))
    with pytest.raises(RunError, match="seen"):
        list(probe._plan("12GB"))
    with pytest.raises(RunError, match="seen"):
        selftest.selftest(None, toy_model, AUTO, torch.device("cpu"))
    answers = {"goal": "style", "captions": [], "num_images": 10}
    from k5cache.options import CacheConfig

    with pytest.raises(RunError, match="seen"):
        implied.implied(answers, ModelConfig(), CacheConfig(), AUTO)
    assert [config.base_model_precision for config in said] == [DYNAMIC] * 5


def test_a_run_writes_down_what_auto_became_says_how_to_have_quantos_and_keeps_it(
    tmp_path, monkeypatch, capsys, toy_cache, toy_model
):
    monkeypatch.setattr(precision, "chosen", lambda configs, **_: DYNAMIC)
    cache, model, root = toy_cache("fp32"), ModelConfig(path=str(toy_model)), tmp_path / "run"
    with only_training():
        result = start(cache, SHORT, root, model, is_new=False)
    said = " ".join(capsys.readouterr().err.split())
    assert "auto: int8-dynamic" in said
    assert "--set train.base_model_precision=int8-quanto" in said
    assert "Loading the transformer (int8-dynamic)" in said
    assert open_run(root)[2].base_model_precision == DYNAMIC
    with safe_open(result.lora, framework="pt") as file:
        assert json.loads(file.metadata()["k5.recipe"])["base_model_precision"] == DYNAMIC
    # On another machine auto would be quanto's.
    monkeypatch.setattr(precision, "chosen", lambda configs, **_: QUANTO)
    options = ["train.base_model_precision=auto", "train.steps=2", "train.optim.lr_scheduler=cosine"]
    monkeypatch.setattr("k5train.training.start.train", lambda data, folder, config, run, **_: config)
    monkeypatch.setattr("k5train.training.start.check_may_go_on", lambda *_: None)
    assert resume(root, options, None).base_model_precision == DYNAMIC


def test_the_same_command_goes_on_with_what_the_stopped_run_began_with(tmp_path, monkeypatch, toy_cache, toy_model):
    cache, model = toy_cache("fp32"), ModelConfig(path=str(toy_model))
    monkeypatch.setattr(precision, "chosen", lambda configs, **_: DYNAMIC)
    monkeypatch.setattr("k5train.training.start.train", lambda data, folder, config, run, **_: config)
    for began_with in (QUANTO, DYNAMIC):  # the first is a run of an earlier version
        root = tmp_path / began_with
        config = replace(SHORT, name=root.name)
        create_run(root, cache, model, replace(config, base_model_precision=began_with))
        assert start(cache, config, root, model, is_new=False).base_model_precision == began_with
    with pytest.raises(RunError, match='base_model_precision: "int8-dynamic", now "no_change"'):
        start(cache, replace(config, base_model_precision="no_change"), root, model, is_new=False)


def test_all_runs_of_a_sweep_get_one_precision_and_those_added_later_get_the_same(tmp_path, gpu, toy_cache, toy_model):
    auto = replace(SHORT, mixed_precision="bf16", device="auto")
    lora, dora = SweepRun("lora", auto), SweepRun("dora", replace(auto, lora=replace(auto.lora, algo="dora")))

    def chosen_for(out: Path, *runs: SweepRun) -> list[str]:
        known = with_known_precision(out, runs)
        return [run.config.base_model_precision for run in decide_together(known)]

    assert chosen_for(tmp_path / "new", lora) == [DYNAMIC]
    assert chosen_for(tmp_path / "new", lora, dora) == [QUANTO, QUANTO]
    explicit = SweepRun("bf16", replace(auto, base_model_precision="no_change"))
    assert chosen_for(tmp_path / "new", explicit) == ["no_change"]
    for began_with, expected in ((QUANTO, QUANTO), (DYNAMIC, DYNAMIC)):
        out = tmp_path / began_with
        out.mkdir()
        model = ModelConfig(path=str(toy_model))
        create_run(
            out / "first", toy_cache("fp32"), model, replace(auto, name="first", base_model_precision=began_with)
        )
        assert chosen_for(out, lora) == [expected]
        assert chosen_for(out, dora) == [QUANTO]  # beside int8-dynamic it is refused, as over another base
