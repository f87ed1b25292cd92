"""Does every option of a recipe reach the training loop? A run with it must end with another LoRA."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read, to_dict
from k5cache.store.reader import open_cache
from k5train.data.mixture import open_mixture
from k5train.data.split import split_off
from k5train.options.adapter import LoraConfig, RankConfig
from k5train.options.data import DataConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig, RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.removed import REMOVED, without_removed
from k5train.options.train import TrainConfig
from k5train.planning.plan import largest_sizes, plan_training
from k5train.runs.folder import Run, create_run, open_run
from k5train.runs.metrics import read_metrics
from k5train.runs.recipe import read_recipe
from k5train.training.base import load_base
from k5train.training.train import train
from tests.cli import Cli
from tests.runs import only_training

LR = OptimConfig(lr=1e-2, warmup_steps=0)
PLAIN = TrainConfig(
    steps=2,
    loss_limit=0.0,
    batch_size=2,
    checkpoint_every=0,
    base_model_precision="no_change",
    mixed_precision="fp32",
    device="cpu",
    lora=LoraConfig(rank=2, targets=("qkv",)),
    optim=LR,
)


@pytest.fixture(scope="module")
def finish(toy_model, toy_cache, tmp_path_factory):
    """``finish(config)`` trains on a base that all tests share, and returns the run."""
    cache = toy_cache("fp32")
    device = torch.device("cpu")
    plan = plan_training(toy_model, PLAIN, device, largest_sizes(open_cache(cache)))
    base = load_base(toy_model, PLAIN, device, plan)
    root = tmp_path_factory.mktemp("runs")

    def run(config: TrainConfig) -> Run:
        entries = config.data or (DataConfig(str(cache), repeats=config.repeats),)
        name = f"run-{len(list(root.iterdir()))}"
        created = create_run(root / name, cache, ModelConfig(path=str(toy_model)), replace(config, name=name))
        with only_training():
            train(open_mixture(entries), toy_model, config, created, base)
        return created

    return run


@pytest.fixture(scope="module")
def plain(finish) -> dict[str, torch.Tensor]:
    return load_file(finish(PLAIN).lora)


def objective(**options) -> dict:
    return {"objective": ObjectiveConfig(**options)}


def optim(**options) -> dict:
    return {"optim": replace(LR, **options)}


ACTING = {
    "beta": objective(sigma_sampling="beta"),
    "auto shift": objective(flow_schedule_auto_shift=True),
    "stratified": objective(stratified_sigmas=True),
    "cosmap": objective(weighting="cosmap"),
    "huber": objective(loss_type="huber", huber_c=0.5),
    "tread": {"tread": TreadConfig(routes=(RouteConfig(0.5, 0, -1),))},
    "rollout": {"rollout": RolloutConfig(probability=1.0, num_inference_steps=5)},
    "first caption": {"caption_dropout_probability": 1.0},
    "rslora": {"lora": replace(PLAIN.lora, algo="rslora", alpha=4.0)},
    "dora": {"lora": replace(PLAIN.lora, algo="dora")},
    "lokr": {"lora": replace(PLAIN.lora, algo="lokr")},
    "ranks": {"lora": replace(PLAIN.lora, ranks=(RankConfig("cross_attention.to_key", 3),))},
    "dropout": {"lora": replace(PLAIN.lora, dropout=0.5)},
    "rex": optim(lr_scheduler="rex", lr_end=0.1),
    "adafactor": optim(optimizer="adafactor"),
    "muon": optim(optimizer="muon"),
    "lion": optim(optimizer="lion"),
    "prodigy": optim(optimizer="prodigy", lr=1.0),
    "schedulefree": optim(optimizer="schedulefree"),
    "adamw8bit": optim(optimizer="adamw8bit"),
}


def test_the_same_recipe_ends_at_the_same_lora(finish, plain):
    again = load_file(finish(PLAIN).lora)
    assert all(torch.equal(again[k], plain[k]) for k in plain)


@pytest.mark.parametrize("options", ACTING.values(), ids=ACTING.keys())
def test_an_option_changes_what_is_trained(finish, plain, options):
    lora = load_file(finish(replace(PLAIN, **options)).lora)
    assert all(t.isfinite().all() for t in lora.values())
    differs = lora.keys() != plain.keys() or any(
        lora[k].shape != plain[k].shape or not torch.equal(lora[k], plain[k]) for k in plain
    )
    assert differs


def test_a_lora_goes_on_from_another(finish, plain, tmp_path):
    save_file(plain, first := tmp_path / "first.safetensors")
    second = finish(replace(PLAIN, steps=1, lora=replace(PLAIN.lora, init_lora=str(first))))
    started = load_file(second.lora)
    a = [k for k in plain if "lora_A" in k]  # one step of AdamW moves a weight by its learning rate at most
    assert all((started[k] - plain[k]).abs().max() <= 1.01e-2 for k in a)


def test_the_cost_of_rollouts_is_logged_and_only_where_there_are_any(finish):
    rolled = read_metrics(finish(replace(PLAIN, **ACTING["rollout"])).metrics)
    assert sum(row.get("rollout_passes", 0) for row in rolled) > 0
    assert all(row["rollout_seconds"] > 0 for row in rolled if "rollout_passes" in row)
    assert not any("rollout_passes" in row for row in read_metrics(finish(PLAIN).metrics))


def test_the_average_is_saved_beside_the_lora_which_is_as_without_it(finish, plain):
    result = finish(replace(PLAIN, **optim(ema_decay=0.9)))
    lora, average = load_file(result.lora), load_file(result.ema)
    assert all(torch.equal(lora[k], plain[k]) for k in plain)
    assert any(not torch.equal(average[k], plain[k]) for k in plain)


def test_epochs_take_the_place_of_steps_and_time_ends_a_run(finish):
    result = finish(replace(PLAIN, epochs=2, gradient_accumulation_steps=3))
    # 6 pictures in 3 buckets of 3, 2 and 1: 2 + 1 + 1 batches of two, 8 in two epochs, 3 an update: 3 updates
    assert len(read_metrics(result.metrics)) == 3
    assert len(read_metrics(finish(replace(PLAIN, max_hours=1e-9)).metrics)) <= 1


def test_held_out_rows_leave_the_mixture_but_not_the_cache(toy_cache):
    data = split_off(open_mixture([DataConfig(str(toy_cache("fp32")))]), 0.34)
    assert sum(pool.count(0) for parts in data.pools.values() for pool in parts) == 4
    assert len(data) == 6


def test_several_caches_are_named_on_the_command_line_or_in_the_recipe_but_not_in_both(toy_cache, toy_model, tmp_path):
    from k5train.cli import app

    caches = [str(toy_cache("fp32"))] * 2
    sets = ("steps=1", "base_model_precision=no_change", "mixed_precision=fp32", "lora.targets=['qkv']", "name=two")
    options = [part for option in sets for part in ("--set", f"train.{option}")]
    done = Cli(tmp_path)(app, "run", *caches, "--model", str(toy_model), *options)
    assert done.code == 0, done.err
    assert "and draw it: k5train sample runs/two --prompt PROMPT" in " ".join((done.out + done.err).split())
    without = Cli(tmp_path)(app, "sample", "runs/two")
    assert "Draw one of the 3 that the cache holds: k5train sample runs/two --prompt " in " ".join(without.err.split())
    recipe = (tmp_path / "runs" / "two" / "recipe.toml").read_text()
    assert recipe.count("[[train.data]]") == 2
    (tmp_path / "r.toml").write_text(f"[[train.data]]\ncache = '{caches[0]}'\n")
    both = Cli(tmp_path)(app, "run", caches[0], "-r", "r.toml", "--model", str(toy_model))
    assert both.code == 2
    assert "names its caches in [[train.data]]" in both.err


@pytest.mark.parametrize("number", range(13))
def test_every_recipe_in_the_docs_is_one(number):
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 13
    document = tomllib.loads(blocks[number])
    for recipe in document.get("run", [document]):  # of a sweep's list, or a recipe
        (config,) = parse({"train": recipe["train"]}, {"train": TrainConfig})
        assert config != TrainConfig()


def test_an_option_that_could_do_nothing_is_refused_with_the_reason_beside_all_other_problems():
    words = ["objective.noise_offset=0.05", "memory.enable_model_cpu_offload=true", "lora.init_lora_weights=pissa"]
    words += ["memory.group_offload_type=leaf_level", "steps=0"]
    with pytest.raises(RecipeError) as refused:
        parse(read(None, [f"train.{word}" for word in words]), {"train": TrainConfig})
    for reason in (
        "train.objective.noise_offset does not exist: it corrects schedules that never reach pure noise",
        "For darker or brighter pictures train more on noisy inputs: flow_schedule_shift = 3",
        "train.memory.enable_model_cpu_offload does not exist: stage 2 never loads two models at once",
        "train.lora.init_lora_weights does not exist: PiSSA",
        "train.memory.group_offload_type does not exist: one block is the smallest group",
        "train.steps must be at least 1, found 0",
    ):
        assert reason in refused.value.problem


def test_recipes_of_older_runs_may_hold_the_value_that_such_an_option_always_had():
    old = {
        "objective": {"noise_offset": 0.0}, "lora": {"init_lora_weights": "default"},
        "memory": {"enable_model_cpu_offload": False, "group_offload_type": "block_level"},
    }  # fmt: skip
    assert {table: {*options} for table, options in old.items()} == REMOVED
    (config,) = parse({"train": old}, {"train": TrainConfig})
    assert config == TrainConfig()
    saved = to_dict(TrainConfig())
    assert without_removed({**saved, **{table: {**saved[table], **options} for table, options in old.items()}}) == saved


def test_a_run_of_before_they_went_opens_and_still_refuses_them_as_overrides(tmp_path):
    run = create_run(tmp_path / "run", Path("cache"), ModelConfig(), PLAIN)
    recipe = run.root / "recipe.toml"
    with_both_values = '[train.memory]\ngroup_offload_type = "leaf_level"\n'
    recipe.write_text(recipe.read_text().replace("[train.memory]\n", with_both_values))
    assert "leaf_level" in recipe.read_text()
    assert open_run(run.root)[2] == PLAIN
    document = read_recipe(run.root, ["train.memory.group_offload_type=leaf_level"])
    with pytest.raises(RecipeError, match="group_offload_type does not exist"):
        parse({"train": document["train"]}, {"train": TrainConfig})


def test_a_route_beyond_the_transformer_is_refused_before_anything_is_loaded(toy_model, toy_cache, tmp_path):
    config = replace(PLAIN, tread=TreadConfig(routes=(RouteConfig(0.5, 0, 50),)))
    run = create_run(tmp_path / "run", Path("cache"), ModelConfig(), config)
    with pytest.raises(RecipeError, match="has 3 visual blocks"):
        train(open_mixture([DataConfig(str(toy_cache("fp32")))]), toy_model, config, run)
