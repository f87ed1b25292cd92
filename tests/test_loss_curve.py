"""``loss.png``: which curves are in which panel, what is marked, and that every kind of run has a picture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k5train.options.objective import ObjectiveConfig
from k5train.options.train import TrainConfig
from k5train.runs.loss_curve import draw_losses
from k5train.runs.loss_panels import loss_rows, objective_of, smooth, summary
from k5train.runs.metrics import curve
from k5train.runs.panels import Panel


def training_row(step: int, **values) -> dict:
    return {"step": step, "loss": 1 / step, "grad_norm": 0.1, "lr": 1e-4, "loss_by_sigma": [0.5, None], **values}


def measured_row(step: int, held_out: float | None, **values) -> dict:
    parts = None if held_out is None else [held_out - 0.1, held_out + 0.1]
    return {"step": step, "held_out_loss": held_out, "held_out_by_sigma": parts, **values}


MEASURED = [
    measured_row(0, 0.45, probe_loss=0.5, probe_by_sigma=[0.4, 0.6], held_out_prior_loss=0.3),
    *[training_row(step) for step in range(1, 21)],
    measured_row(10, 0.41, probe_loss=0.4, probe_by_sigma=[0.3, 0.5], held_out_prior_loss=0.31, ema_held_out_loss=0.42),
    measured_row(15, None),
    measured_row(20, 2.56, probe_loss=0.3, probe_by_sigma=[0.2, 0.4], held_out_prior_loss=0.4, ema_held_out_loss=0.43),
]


def panels_of(rows: list[dict], objective: str = "") -> tuple[list[Panel], str]:
    """The panels of rows, in order, and the line under the title."""
    return [panel for row in loss_rows(rows, objective) for panel in row.panels], summary(rows)


def names_of(panel: Panel) -> list[str]:
    return [line.name for line in panel.lines]


def test_training_and_measured_losses_share_an_axis_only_within_a_part_of_sigma():
    panels, _ = panels_of(MEASURED)
    titles = ["Training loss", "Held-out loss and probe loss", "Held-out loss of regularisation data",
              "Sigma 0 to 0.5, least noise", "Sigma 0.5 to 1, most noise", "Learning rate",
              "Norm of the gradients before clipping, and its running mean"]  # fmt: skip
    assert [panel.title for panel in panels] == titles
    assert names_of(panels[0]) == ["each step", "mean of the last 10 steps"]
    assert names_of(panels[1]) == ["held out", "EMA, held out", "probe: images that are trained on"]
    assert names_of(panels[3]) == ["training", "held out", "probe"]
    assert names_of(panels[4]) == ["held out", "probe"]  # no row was trained in this part
    assert panels[3].lines[1].points == [(0, 0.35), (10, pytest.approx(0.31)), (15, None), (20, 2.46)]
    assert {panel.last_step for panel in panels} == {20}


def test_the_base_is_a_level_the_best_is_marked_and_a_value_that_is_missing_is_a_gap():
    panels, summary = panels_of(MEASURED)
    assert [(level.name, level.value) for level in panels[1].levels] == [("base (dashed)", 0.45), ("", 0.5)]
    (best,) = panels[1].marks
    assert (best.name, best.step, best.value) == ("best: 0.41 at step 10", 10, 0.41)
    assert panels[1].lines[0].points[2] == (15, None)
    assert summary == "20 steps; held-out loss 0.45 (base), last 2.56; probe loss 0.5 (base), last 0.3"
    panels, _ = panels_of([measured_row(0, 0.45), training_row(1), measured_row(1, 2.56)])
    assert panels[1].marks[0].name == "best: the base, 0.45"


def test_what_was_not_measured_has_no_panel_and_rows_of_earlier_versions_are_drawn():
    old = [{"step": i, "loss": 0.5, "grad_norm": 0.1, "lr": 1e-4, "seconds": 1.0} for i in range(1, 6)]
    panels, summary = panels_of(old)
    assert [panel.title for panel in panels][1:] == ["Learning rate", panels[-1].title]
    assert summary == "5 steps"
    old.insert(0, {"step": 0, "held_out_loss": 0.4, "held_out_by_sigma": [0.3, 0.5]})
    assert names_of(panels_of(old)[0][3]) == ["held out"]
    probed = [{"step": 0, "probe_loss": 0.4, "probe_by_sigma": [0.4]}, training_row(1)]
    assert [p.title for p in panels_of(probed)[0]][1:3] == ["Probe loss", "Sigma 0 to 0.5, least noise"]
    one_part = [{"step": 0, "held_out_loss": 0.4, "held_out_by_sigma": [0.4]}, training_row(1, loss_by_sigma=[0.3])]
    assert [p.title for p in panels_of(one_part)[0]][1:3] == ["Held-out loss", "Learning rate"]


def test_the_rate_of_prodigy_is_drawn_as_it_acts():
    rate = panels_of([training_row(i, prodigy_d=2.0 * i) for i in (1, 2)])[0][-2]
    assert rate.title == "Learning rate times Prodigy's d"
    assert rate.lines[0].points == [(1, pytest.approx(2e-4)), (2, pytest.approx(4e-4))]


def test_a_long_run_is_drawn_as_means_behind_the_running_mean():
    pale, mean = panels_of([training_row(i) for i in range(1, 1002)])[0][0].lines
    assert (pale.name, mean.name) == ("means of 5 steps", "mean of the last 51 steps")
    assert pale.points[0] == (5, pytest.approx(sum(1 / i for i in range(1, 6)) / 5))
    assert pale.points[-1] == (1001, 1 / 1001)  # the rest
    assert len(pale.points) == 201
    ((merged, its_mean), *_) = ([*row.panels[0].lines] for row in loss_rows([training_row(i) for i in (1, 2)], "", 8))
    assert (merged.name, its_mean.name) == ("means of 8 steps", "mean of the last 80 steps")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 3}],
        [measured_row(0, None)],
        [training_row(1)],
        MEASURED,
        [training_row(i, loss=10.0**i, loss_by_sigma=[0.1] * 20) for i in range(1, 30)],
        [
            training_row(1, loss=None, loss_by_sigma="?", lr=None, grad_norm=[1]),
            measured_row(1, None, probe_loss="0.1"),
        ],
    ],
    ids=["empty", "nothing", "NaN at the start", "one step", "measured", "diverged, many parts", "not numbers"],
)
def test_every_kind_of_run_has_a_picture(rows):
    assert draw_losses(rows, "a run").width == 1200


def test_the_smoothed_curve_is_the_mean_of_the_last_values_and_begins_with_half_of_them():
    assert smooth([(i, float(i)) for i in range(12)])[-1] == (11, 6.5)  # of 2 to 11
    assert smooth([(1, 4.0), (2, None), (3, 2.0)]) == [(1, 4.0), (3, 3.0)]
    assert smooth([(i, float(i)) for i in range(20)])[0] == (4, 2.0)
    assert smooth([]) == []


def test_a_field_is_read_over_the_lines_that_have_it():
    rows = [{"step": 0, "a": 1.0}, {"step": 1, "b": [0.5, None]}, {"step": 2, "a": None, "b": [2.0]}]
    assert curve(rows, "a") == [(0, 1.0), (2, None)]
    assert curve(rows, "b", 0) == [(1, 0.5), (2, 2.0)]
    assert curve(rows, "b", 1) == [(1, None), (2, None)]


@pytest.mark.parametrize(
    ("objective", "shift", "text"),
    [
        ({}, 1.0, "sigma drawn from sigmoid(N(0, 1))"),
        ({"sigmoid_scale": 1.5}, 3.0, "sigma drawn from sigmoid(1.5 x N(0, 1)), shift 3"),
        ({"sigma_sampling": "logit_normal", "logit_mean": -0.5}, 1.0, "sigma drawn from sigmoid(N(-0.5, 1))"),
        ({"sigma_sampling": "uniform", "flow_schedule_auto_shift": True}, 1.0,
         "sigma drawn from 0 to 1 evenly, shifted by the size of each bucket"),
        ({"sigma_sampling": "beta", "weighting": "min_snr", "loss_type": "huber", "masked_loss": True}, 1.0,
         "sigma drawn from Beta(2, 2); weighted by min_snr; Huber's error; within masks"),
        ({"sigma_sampling": "mode"}, 1.0, "sigma drawn from SD3's mode distribution, scale 1.29"),
    ],
)  # fmt: skip
def test_the_training_panel_says_which_sigmas_and_weights_its_loss_has(objective, shift, text):
    config = replace(TrainConfig(), objective=ObjectiveConfig(**objective), flow_schedule_shift=shift)
    assert objective_of(config) == text
    panel = panels_of([training_row(1)], text)[0][0]
    assert panel.note == text[0].upper() + text[1:]
    assert ("squared" in panel.y_label) == ("min_snr" not in text)
