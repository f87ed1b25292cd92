"""The time that a plan predicts: counted up as a plain loop would, from blocks that are timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from k5train.bench import probe
from k5train.options.memory import MemoryConfig
from k5train.options.objective import ObjectiveConfig, RouteConfig, TreadConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import Plan, Streaming
from k5train.planning.plan import token_shares
from k5train.planning.time import Block, Probed, Seconds, Size, StepTime, blocks_of, count_up
from tests.runs import CONFIG
from tests.test_memory import SMALL

PLAN = Plan(("all", "all", "nothing", "nothing"), None, {}, None, 0, (64, 8))
SIZES = [Size(64, 8, 0.25), Size(36, 8, 0.75)]


def seconds_of(block: Block) -> float:
    return (1 if block.level == "all" else 2) * block.num_tokens


def probed(shares=(), rate: float = 0.0) -> Probed:
    blocks = {block: Seconds(seconds_of(block), 0.5) for size in SIZES for block in blocks_of(PLAN, size, shares)}
    return Probed(blocks, {size: Seconds(10.0, 5.0) for size in SIZES}, rate)


@pytest.mark.parametrize("shares", [(), (1.0, 0.5, 0.5, 1.0)])
def test_a_step_is_counted_up_over_blocks_and_sizes(shares):
    expected = 0.0
    for tokens, share in ((64, 0.25), (36, 0.75)):
        step = 10.0
        for i, level in enumerate(PLAN.levels):
            step += (1 if level == "all" else 2) * tokens * (shares[i] if shares else 1)
        expected += share * step
    assert count_up(probed(shares), PLAN, SIZES, shares) == StepTime(expected, 5.0 + 4 * 0.5)
    assert count_up(probed(shares), PLAN, SIZES, shares, num_passes=3).seconds == 3 * expected


def test_streamed_weights_travel_twice_and_ahead_of_their_use_beside_the_computing():
    computing = count_up(probed(), PLAN, SIZES).seconds
    for prefetch, gigabytes, expected in (
        (True, 1, computing),
        (True, 1000, 2000.0),
        (False, 1, computing + 2),
        (False, 1000, computing + 2000),
    ):
        plan = replace(PLAN, streaming=Streaming(2, 2, prefetch), host_bytes=gigabytes * 10**9)
        assert count_up(probed(rate=1e-9), plan, SIZES).seconds == pytest.approx(expected)


def test_the_table_says_how_sure_the_time_is_and_what_it_leaves_out():
    step, config = StepTime(0.25, 0.2), TrainConfig(steps=1200)
    assert step.describe(config) == (
        "250 ms a step, 5 min 0 s for 1,200 steps, give or take 30%, without compiling, pictures and measurements: "
        "counted up from blocks timed on this GPU"
    )
    preserved = replace(config, objective=ObjectiveConfig(preservation_weight=1.0))
    assert "without compiling, pictures and measurements, preservation_weight's passes: " in step.describe(preserved)


def test_without_a_gpu_no_time_is_known():
    assert probe.estimate(SMALL, CONFIG, PLAN, SIZES, torch.device("cpu")) is None


def test_every_level_and_size_of_a_plan_is_timed_as_a_run_would_run_it(monkeypatch):
    seen: dict[tuple[str, int, int, int], int] = {}
    ran: list[int] = []

    def seconds(step, device):
        ran.append(1)
        step()
        return Seconds(len(ran), len(ran))

    original = probe._time_blocks

    def noting(config, train, plan, level, num_blocks, blocks, device):
        seen.update({(level, num_blocks, *block[1:]): 1 for block in blocks})
        return original(config, train, plan, level, num_blocks, blocks, device)

    monkeypatch.setattr(probe, "_time", seconds)
    monkeypatch.setattr(probe, "_time_blocks", noting)
    config = replace(
        CONFIG, memory=MemoryConfig(execution="eager"), gradient_accumulation_steps=2,
        tread=TreadConfig(routes=(RouteConfig(0.5, 1, 1),)),
    )  # fmt: skip
    sizes = [Size(16, 5, 1.0)]
    plan = replace(PLAN, sizes=(16, 5))
    step = probe.probe(SMALL, config, plan, sizes, torch.device("cpu"))
    assert token_shares(config.tread.routes, 4) == (1, 0.5, 1, 1)
    assert set(seen) == {
        (level, n, tokens, 5) for n in (2, 6) for level, tokens in (("all", 16), ("all", 8), ("nothing", 16))
    }
    # Times 1, 2 of two blocks, 3, 4 of six, then 5 and 6: each block takes a quarter of the difference.
    assert step.seconds == pytest.approx(2 * ((1 - 2 * 0.5) + 0.5 + 0.5 + 2 * 0.25))
