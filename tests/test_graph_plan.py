"""Which runs are planned to be captured as CUDA graphs, what is counted for it, and what turns it off by name?"""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from k5train.base.architecture import FULL_SIZE
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig, RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.planning import graph, memory
from k5train.planning.described import describe
from k5train.planning.graph import text_width, why_no_graph
from k5train.planning.plan import adapter_size, plan_for
from k5train.planning.saved_plan import plan_of
from k5train.training import session

GIB = 2**30
GPU = torch.device("cuda")
AUTO = TrainConfig(memory=MemoryConfig(graph="auto"), lora=LoraConfig(rank=16, targets=("qkv",)))
ROUTES = (RouteConfig(0.5, 2, -3),)


def test_each_thing_that_turns_capturing_off_is_named(monkeypatch):
    assert why_no_graph(AUTO, "cuda", "compiled") is None
    assert why_no_graph(replace(AUTO, tread=TreadConfig(routes=ROUTES)), "cuda", "compiled") is None
    named = {
        "there is no GPU": (AUTO, "cpu", "compiled"),
        "train.memory.graph": (replace(AUTO, memory=MemoryConfig(graph="off")), "cuda", "compiled"),
        "blocks run eager": (AUTO, "cuda", "eager"),
        "train.rollout.probability": (replace(AUTO, rollout=RolloutConfig(probability=0.1)), "cuda", "compiled"),
        "train.objective.preservation_weight": (
            replace(AUTO, objective=ObjectiveConfig(preservation_weight=1.0)), "cuda", "compiled"
        ),
        "train.lora.dropout": (replace(AUTO, lora=LoraConfig(dropout=0.1)), "cuda", "compiled"),
        "train.tread.ramp_down": (replace(AUTO, tread=TreadConfig(routes=ROUTES, ramp_down=0.1)), "cuda", "compiled"),
        "train.tread.keep_masked": (
            replace(AUTO, tread=TreadConfig(routes=ROUTES, keep_masked=True)), "cuda", "compiled"
        ),
    }  # fmt: skip
    for name, arguments in named.items():
        assert name in str(why_no_graph(*arguments)), name
    monkeypatch.setattr(graph, "is_rocm", lambda: True)
    assert "AMD" in str(why_no_graph(AUTO, "cuda", "compiled"))


def test_the_graph_is_counted_and_captions_have_room_for_the_longest():
    off = replace(AUTO, memory=MemoryConfig(graph="off"))
    captured, plain = (plan_for(FULL_SIZE, config, GPU, (4096, 250), 16 * GIB) for config in (AUTO, off))
    assert (captured.is_captured, plain.is_captured) == (True, False)
    assert captured.parts["CUDA graph"] == memory._GRAPH_BYTES
    assert "CUDA graph" not in plain.parts
    assert (captured.sizes, plain.sizes) == ((4096, 256), (4096, 250))
    assert [text_width(n) for n in (1, 16, 17, 512)] == [16, 16, 32, 512]
    assert captured.peak <= 16 * GIB * 0.97
    assert any("captured" in how for _, how in describe(captured))
    assert not any("captured" in how for _, how in describe(plain))


def test_what_an_update_needs_for_a_moment_is_counted_where_a_graph_holds_the_activations():
    def of_parameters(optimizer: str, graph: str) -> int:
        config = replace(AUTO, optim=OptimConfig(optimizer=optimizer), memory=MemoryConfig(graph=graph))  # type: ignore[arg-type]
        return plan_for(FULL_SIZE, config, GPU, (4096, 250), 16 * GIB).parts["LoRA, gradients, optimizer"]

    parameters = adapter_size(FULL_SIZE, AUTO.lora)[0]
    assert of_parameters("schedulefree", "auto") == of_parameters("schedulefree", "off") + 4 * parameters
    assert of_parameters("adamw", "auto") == of_parameters("adamw", "off")


def test_a_few_blocks_are_streamed_for_a_graph_and_where_there_is_no_room_nothing_is_captured():
    def plan(budget: float, **options: object) -> memory.Plan:
        config = replace(AUTO, memory=MemoryConfig(**{"graph": "auto", **options}))  # type: ignore[arg-type]
        return plan_for(FULL_SIZE, config, GPU, (4096, 256), int(budget))

    resident = plan(1e12, graph="off", activations="nothing").peak / 0.97 + 2**20  # the least without streaming
    assert plan(resident, graph="off").streaming is None
    captured = plan(resident)
    assert captured.is_captured
    assert captured.streaming is not None
    assert captured.streaming.num_blocks <= 5
    least = plan(1e12, graph="off", activations="nothing", enable_group_offload=True).peak / 0.97 + 2**20
    assert not plan(least).is_captured
    assert plan(least + memory._GRAPH_BYTES / 0.97).is_captured


def test_a_run_whose_plan_does_not_count_its_graph_says_which_of_three_reasons_it_has():
    def reason(plan: memory.Plan) -> str:
        base = SimpleNamespace(transformer=SimpleNamespace(config=FULL_SIZE), plan=plan, device=GPU)
        return session._why_not_planned(base, AUTO)  # type: ignore[arg-type]

    dropout = replace(AUTO, lora=replace(AUTO.lora, dropout=0.1))  # of a sweep: it needs most, and captures nothing
    shared = plan_for(FULL_SIZE, dropout, GPU, (4096, 256), 16 * GIB)
    assert reason(shared).startswith("the memory plan is that of another run of the sweep")
    streamed = MemoryConfig(graph="off", activations="nothing", enable_group_offload=True)
    least = plan_for(FULL_SIZE, replace(AUTO, memory=streamed), GPU, (4096, 256), int(1e12))
    full = replace(least, budget=int(least.peak / 0.97) + 2**20)
    assert reason(full) == "the memory plan has no room for them"
    assert reason(replace(full, budget=2 * GIB)) == "this run has a memory plan that was made for others"


@pytest.mark.parametrize("config", [AUTO, replace(AUTO, memory=MemoryConfig(graph="off"))], ids=["auto", "off"])
def test_a_saved_plan_says_whether_it_captured_and_an_older_one_did_not(config):
    plan = plan_for(FULL_SIZE, config, GPU, (4096, 256), 16 * GIB)
    document = asdict(plan)
    assert plan_of(document) == plan
    del document["is_captured"]
    assert plan_of(document) == replace(plan, is_captured=False)
