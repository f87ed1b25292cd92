"""Is a user warned about an option without effect, and only then?"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch

from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read
from k5train.adapter import attach, files
from k5train.adapter.lokr import lokr_warnings
from k5train.adapter.targets import linear_sizes
from k5train.base.quantize import load_transformer
from k5train.data.batch_sizes import batch_warnings
from k5train.data.mixture import Pool, epoch_batches
from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.rate import rate_warnings, with_usual_rate
from k5train.options.train import TrainConfig
from k5train.options.without_effect import BELONGS_TO, NEEDS, options_without_effect
from k5train.training.start import start
from k5train.training.sweep_runs import sweep_runs
from tests.runs import same


def lines(*options: str) -> list[str]:
    (config,) = parse(read(None, [f"train.{option}" for option in options]), {"train": TrainConfig})
    return options_without_effect(config)


def test_nothing_is_said_of_the_defaults():
    assert lines() == []


@pytest.mark.parametrize(
    ("idle", "what", "acting"),
    [
        ("objective.huber_c=0.5", "it belongs to train.objective.loss_type = huber", "objective.loss_type=huber"),
        ("objective.logit_mean=1", "sigma_sampling = logit_normal", "objective.sigma_sampling=logit_normal"),
        ("optim.lr_end=0.1", "linear or polynomial or cosine", "optim.lr_scheduler=rex"),
        ("tread.ramp_down=0.1", "train.tread.routes is not set",
         "tread.routes=[{selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2}]"),
        ("rollout.max_steps=2", "train.rollout.probability is not set", "rollout.probability=0.1"),
        ("validation.held_out_every=5", "train.validation.split is not set", "validation.split=0.1"),
        ("memory.group_offload_blocks_per_group=2", "enable_group_offload is not set",
         "memory.enable_group_offload=true"),
        ("trackers.project=mine", "train.trackers.use is not set", 'trackers.use=["wandb"]'),
        ("objective.prior_loss_weight=0.5", "no [[train.data]] entry has is_regularisation_data",
         'data=[{cache="a", is_regularisation_data=true}]'),
    ],
)  # fmt: skip
def test_an_option_without_what_it_belongs_to_is_named(idle, what, acting):
    (line,) = lines(idle)
    assert line.startswith(f"train.{idle.partition('=')[0]} does nothing here: ")
    assert what in line
    assert lines(idle, acting) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["steps=50", "epochs=2"], "train.steps does nothing here: train.epochs says when to stop"),
        (["repeats=5", 'data=[{cache="a"}]'], "train.repeats does nothing here"),
        (["optim.optimizer=adafactor", "optim.betas=[0.9,0.9]"], "train.optim.betas does nothing here"),
        (["steps=40"], "train.optim.lr is never reached: the warm-up takes 100 steps and the run 40. "
                       "Use --set train.optim.warmup_steps=4"),
        (["rollout.probability=0.1", "rollout.ramp_steps=1000"],
         "train.rollout.probability is never reached: its ramp takes 1000 steps and the run 1000. "
         "Use --set train.rollout.ramp_steps=100"),
        (["rollout.probability=0.1", "objective.sigma_max=0.05"], "train.rollout.probability does nothing here"),
    ],
)  # fmt: skip
def test_numbers_that_another_number_makes_idle_are_named(options, said):
    (line,) = lines(*options)
    assert line.startswith(said)


def test_every_name_and_value_is_one():
    for name in [*BELONGS_TO, *NEEDS, *NEEDS.values()]:
        attrgetter(name)(TrainConfig())
    for other, values in BELONGS_TO.values():
        for value in values:
            assert lines(f"{other}={value}") == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # A rate of AdamW's for a LoRA, and what is usual instead.
        (["lora.algo=lokr", "optim.lr=1e-4"], "train.optim.lr is 0.0001, at which a LoKr hardly learns. Leave it out"),
        (["optim.optimizer=lion", "optim.lr=1e-4"], "every update of Lion. Leave it out for 3.3e-05"),
        (["optim.optimizer=muon", "optim.lr=5e-5"], "a fifth of its size. Leave it out for 0.00025"),
        (["optim.optimizer=prodigy", "optim.lr=1e-4"], "it finds by it. Leave it out for 1, which"),
        (["lora.algo=rslora", "optim.lr=1e-4"], "scaled by 5.66: it changes the model about as a LoRA does at 0.0004. "
         "Use --set train.optim.lr=2.5e-05, which is as a LoRA at 0.0001"),
        # The rate is the usual one, and alpha makes it four times as strong.
        (["lora.algo=rslora", "lora.rank=16", "lora.alpha=64"], "scaled by 16: it changes the model about as a LoRA "
         "does at 0.0004. Use --set train.optim.lr=8.9e-06"),
    ],
)  # fmt: skip
def test_a_rate_of_another_adapter_or_optimizer_is_named(options, said):
    (config,) = parse(read(None, [f"train.{option}" for option in options]), {"train": TrainConfig})
    (line,) = rate_warnings(config)
    assert said in line
    usual = with_usual_rate(
        replace(config, optim=replace(config.optim, lr=None), lora=replace(config.lora, alpha=None))
    )
    assert rate_warnings(usual) == []


def test_each_adapter_and_optimizer_has_its_usual_rate_and_a_number_stays():
    expected = {
        ("lora", "adamw"): 1e-4, ("dora", "adamw"): 1e-4, ("rslora", "adamw"): 2.5e-5, ("lokr", "adamw"): 1e-3,
        ("lora", "adamw8bit"): 1e-4, ("lora", "schedulefree"): 1e-4, ("lora", "adafactor"): 1e-4,
        ("lora", "lion"): 3.3e-5, ("lokr", "lion"): 3.3e-4, ("lora", "muon"): 2.5e-4, ("rslora", "muon"): 6.3e-5,
        ("lora", "prodigy"): 1.0, ("lokr", "prodigy"): 1.0,
    }  # fmt: skip
    for (algo, optimizer), rate in expected.items():
        config = TrainConfig(lora=LoraConfig(algo=algo), optim=OptimConfig(optimizer=optimizer))
        assert with_usual_rate(config).optim.lr == rate, (algo, optimizer)
        assert rate_warnings(config) == [], (algo, optimizer)
        chosen = replace(config, optim=replace(config.optim, lr=7e-3))
        assert with_usual_rate(chosen) is chosen
    high = TrainConfig(lora=LoraConfig(algo="rslora", rank=100))
    assert with_usual_rate(high).optim.lr == 1.4e-5  # a LoRA's, divided by 0.7 * 10
    assert with_usual_rate(replace(high, lora=LoraConfig(algo="rslora", rank=1))).optim.lr == 1e-4


def test_runs_of_a_grid_have_rates_of_their_own():
    _, runs = sweep_runs(read(None, []), ["train.lora.algo=lora,lokr", "train.optim.optimizer=adamw,lion"], None)
    assert [run.config.optim.lr for run in runs] == [1e-4, 3.3e-5, 1e-3, 3.3e-4]
    _, runs = sweep_runs(read(None, ["train.lora.algo=lokr"]), ["train.optim.lr=1e-4,3e-3"], None)
    assert [run.config.optim.lr for run in runs] == [1e-4, 3e-3]
    _, runs = sweep_runs(read(None, ["train.optim.lr=5e-4"]), ["train.lora.algo=lora,lokr"], None)
    assert [run.config.optim.lr for run in runs] == [5e-4, 5e-4]


def test_a_lokr_is_told_that_its_rank_does_nothing_exactly_where_the_bits_are_equal(toy_model):
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
    sizes = linear_sizes(transformer)
    targets = (
        "visual_transformer_blocks.0.cross_attention.to_key",
        "visual_transformer_blocks.0.feed_forward.in_layer",
    )

    @functools.cache
    def adapter(config: LoraConfig):
        attach.add_lora(transformer, replace(config, targets=targets), seed=1)
        state = files.lora_state_dict(transformer)
        transformer.unload_lora()
        return state

    def said_of(config: LoraConfig) -> list[str]:
        return lokr_warnings(config, {name: sizes[name] for name in targets})

    whole = {factor: adapter(LoraConfig(algo="lokr", rank=10**5, decompose_factor=factor)) for factor in (-1, 4, 500)}
    outcomes = set()
    for factor, rank in ((-1, 2), (-1, 7), (-1, 8), (-1, 9), (-1, 15), (-1, 16), (-1, 64), (4, 16), (4, 500), (500, 4)):
        config = LoraConfig(algo="lokr", rank=rank, decompose_factor=factor)
        state, lines = adapter(config), said_of(config)
        ranks, factors = ([line for line in lines if line.startswith(f"train.lora.{name} does nothing here")]
                          for name in ("rank", "decompose_factor"))  # fmt: skip
        assert bool(ranks) == same(state, whole[factor]), (factor, rank)
        assert bool(factors) == (factor != -1 and same(state, adapter(replace(config, decompose_factor=-1))))
        outcomes |= {(bool(ranks), bool(factors))}
        if ranks:
            least = int(re.search(r"rank (\d+) or more", ranks[0])[1])
            assert not said_of(replace(config, rank=least - 1))[: 1 - bool(factors)]
            assert said_of(replace(config, rank=least))
    assert outcomes == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize(
    ("options", "buckets", "said"),
    [
        (["batch_size=14"], {(512, 512): 14}, None),
        (["batch_size=64"], {(512, 512): 14}, "train.batch_size is 64, but an epoch has 14 rows, so that its one "
         "batch has no more. Use --set train.batch_size=14, which every bucket fills"),
        (["batch_size=64", "repeats=5"], {(512, 512): 14}, "batches have 35 rows on average: the last one of each "
         "bucket has what is left. Use --set train.batch_size=38, which every bucket fills"),
        (["batch_size=64", "repeats=9"], {(512, 512): 14}, None),  # 64 and 62
        (["batch_size=4"], {(512, 512): 14, (448, 576): 3, (576, 448): 2}, "2 of 3 buckets have fewer rows in an "
         "epoch (576x448 has 2, 448x576 has 3): batches have 3.17 rows on average. Use --set train.batch_size=2"),
        (["batch_size=4", "repeats=2"], {(512, 512): 14, (448, 576): 3, (576, 448): 2}, None),
        (["gradient_accumulation_steps=30"], {(512, 512): 14}, "train.gradient_accumulation_steps is 30, but an epoch "
         "has 14 batches: each update goes 2.1 times through the images. Use --set train.gradient_accumulation_steps"),
        (["gradient_accumulation_steps=30", "repeats=3"], {(512, 512): 14}, None),
    ],
)  # fmt: skip
def test_batches_that_a_bucket_cannot_fill_are_named(options, buckets, said):
    def lines_of(*options: str) -> list[str]:
        (config,) = parse(read(None, [f"train.{option}" for option in options]), {"train": TrainConfig})
        rate = {size: float(config.repeats * rows) for size, rows in buckets.items()}
        pools = {size: [Pool(list(range(rows)), rate[size], 0.0)] for size, rows in buckets.items()}
        mixture = SimpleNamespace(pools=pools)
        batches = epoch_batches(pools, config.batch_size, 0, torch.Generator())
        held = batch_warnings(mixture, config)
        assert bool(held) == (
            len(batches) < config.gradient_accumulation_steps
            or min(rate.values()) < config.batch_size
            or sum(map(len, batches)) < 0.75 * len(batches) * config.batch_size
        )
        return held

    found = lines_of(*options)
    assert (said in found[0] and len(found) == 1) if said else found == []
    if said:
        advised = re.search(r"--set train\.(\S+=\d+)", found[0])[1]
        assert lines_of(*options, advised) == []


def test_a_run_says_it_at_its_start(toy_model, toy_cache, tmp_path, monkeypatch, capsys):
    """Of what the recipe says alone, of its buckets, its epochs and its model, before anything is downloaded."""
    options = ["objective.huber_c=0.5", "epochs=1", "batch_size=50", "gradient_accumulation_steps=50", "lora.algo=lokr",
               "lora.rank=900", "optim.lr=1e-4", "flow_schedule_shift=9", "validation.guidance_scale=7"]  # fmt: skip
    (config,) = parse(read(None, [f"train.{option}" for option in options]), {"train": TrainConfig})
    monkeypatch.setattr("k5train.training.start.model_folder", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(toy_cache("fp32"), config, tmp_path / "run", ModelConfig(path=str(toy_model)), False)
    said = " ".join(capsys.readouterr().err.split())
    for line in (
        "train.objective.huber_c does nothing here",
        "a LoKr hardly learns",
        "the warm-up takes 100 steps and the run",
        "train.batch_size is 50, but",
        "gradient_accumulation_steps is 50, but an epoch has",
        "train.lora.rank does nothing here",
        "train.flow_schedule_shift is 9: ",
        "train.validation.guidance_scale is 7: ",
    ):
        assert line in said
    assert said.count("warning: ") == 8
