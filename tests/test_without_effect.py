"""Is a user warned about an option without effect, and only then?"""

from __future__ import annotations

from operator import attrgetter

import pytest

from k5cache.shared.recipe import parse, read
from k5train.options.train import TrainConfig
from k5train.options.without_effect import BELONGS_TO, NEEDS, options_without_effect
from k5train.training.start import start


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


def test_a_run_says_it_at_its_start(monkeypatch, capsys):
    (config,) = parse(read(None, ["train.objective.huber_c=0.5"]), {"train": TrainConfig})
    monkeypatch.setattr("k5train.training.start.open_data", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(None, config, None, None, False)
    assert "warning: train.objective.huber_c does nothing here" in capsys.readouterr().err
