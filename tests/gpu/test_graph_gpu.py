"""On a GPU: do captured steps train as uncaptured ones do, bit for bit where they must, within their planned memory?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from k5cache.shared.vram import limit
from k5train.adapter import attach
from k5train.base import architecture, random_weights
from k5train.bench import steps
from k5train.bench.case import Case
from k5train.bench.one_step import OneStep, make_session
from k5train.data.batch import Batch, Group
from k5train.forward.load import stream_weights, streamed_blocks
from k5train.forward.predict_velocity import predict_velocity
from k5train.forward.routing import Route
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import Plan, Streaming
from k5train.training import session as session_module
from k5train.training.determinism import determinism
from k5train.training.optimizer import set_rate
from k5train.training.recorder import CudaGraphs, make_recorder
from k5train.training.session import Session
from tests.new_process import in_a_new_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
# A few blocks of the real width: what is seen of six holds for fifty.
WIDE = {**architecture.FULL_SIZE, "num_visual_blocks": 6, "num_text_blocks": 1}
CONFIG = TrainConfig(
    base_model_precision="int8-quanto", mixed_precision="bf16", deterministic=True, optim=OptimConfig(lr=1e-3),
    lora=LoraConfig(rank=16, targets=("official",)), memory=MemoryConfig(graph="auto"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_gpu():
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def a_group(seed: int, side: tuple[int, int] = (512, 512), tokens: int = 77, rows: int = 1, **fields: Any) -> Group:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = (rows, 1, side[1] // 8, side[0] // 8, 16)
    text = draw(rows, tokens, WIDE["in_text_dim"]).bfloat16()
    sigma = torch.rand(rows, generator=generator)
    return Group(draw(*shape), draw(*shape), sigma, text, draw(rows, WIDE["in_text_dim2"]).bfloat16(), **fields).pin()


def kept(seed: int, num_tokens: int = 1024) -> tuple[Route, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (Route(1, -2, torch.randperm(num_tokens, generator=generator)[: num_tokens // 2].sort().values[None]),)


MASK = (torch.arange(64 * 64).view(1, 1, 64, 64, 1) % 7 > 2).float()
GROUPS: dict[str, Callable[[int], Group]] = {
    "two sizes, all lengths": lambda i: a_group(
        i, (512, 512) if i // 2 % 3 else (640, 384), (1, 5, 77, 128, 200, 256)[i % 6]
    ),
    "routes, masks, weights": lambda i: a_group(i, routes=kept(i), mask=MASK, weight=torch.tensor([0.1 + i])),
    "captions of two lengths": lambda i: a_group(i, rows=2, tokens=100, text_lengths=((100, 7), (1, 100))[i % 2]),
}


def new_session(config: TrainConfig, streaming: Streaming | None = None, level: Any = "selective") -> Session:
    plan = Plan((level,) * WIDE["num_visual_blocks"], streaming, {}, None, 0, (1024, 256), is_captured=True)
    transformer = random_weights.random_transformer(WIDE, "int8-quanto", GPU, frozenset(streamed_blocks(plan)))
    stream_weights(transformer, plan, GPU)
    attach.add_lora(transformer, config.lora, seed=0)
    return make_session(transformer, config, GPU, plan)


def weights_of(session: Session) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in session.parameters.values()])


def train(
    session: Session, config: TrainConfig, group_of: Callable[[int], Group], first: int, last: int
) -> list[float]:
    """Updates ``first`` to ``last - 1``, of two micro-batches each; returns the norms."""
    norms = []
    for number in range(first, last):
        step = OneStep(session, config, group_of(2 * number))
        step.batch = Batch((0, 1), (group_of(2 * number), group_of(2 * number + 1)))
        set_rate(session.optimizer, 1e-3 / (1 + number))
        norms.append(step())
    return norms


class Fails(CudaGraphs):
    """Has no memory for a graph when one is captured."""

    def record(self, work: Any) -> Any:
        torch.cuda.empty_cache()
        limit(GPU, torch.cuda.memory_reserved() + 2**20)
        try:
            return super().record(work)
        finally:
            limit(GPU, None)


@pytest.fixture
def failing(monkeypatch):
    """From now on there is no memory for graphs."""
    return lambda: monkeypatch.setattr(session_module, "make_recorder", Fails)


@pytest.mark.parametrize("group_of", GROUPS.values(), ids=GROUPS)
def test_twenty_captured_updates_have_the_bits_of_uncaptured_ones(group_of, failing, capsys):
    with determinism(True):
        captured = new_session(CONFIG)
        norms = train(captured, CONFIG, group_of, 0, 20)
        assert captured.graphs is not None
        assert captured.graphs.num_graphs in (1, 2)
        assert not captured.graphs.is_off
        failing()
        capsys.readouterr()
        uncaptured = new_session(CONFIG)
        assert train(uncaptured, CONFIG, group_of, 0, 20) == norms
        assert uncaptured.graphs is not None
        assert uncaptured.graphs.is_off
        assert " ".join(capsys.readouterr().err.split()).count("not enough memory to capture it") == 1
        assert torch.equal(weights_of(captured), weights_of(uncaptured))


def test_they_are_near_updates_that_take_each_pass_as_it_comes():
    group_of, off = GROUPS["two sizes, all lengths"], replace(CONFIG, memory=MemoryConfig(graph="off"))
    ours, plain = new_session(CONFIG), new_session(off)
    start = weights_of(ours)
    assert plain.graphs is None
    norms = train(ours, CONFIG, group_of, 0, 6)
    assert norms == pytest.approx(train(plain, off, group_of, 0, 6), rel=2e-2)  # bfloat16 in other orders
    assert F.cosine_similarity(weights_of(ours) - start, weights_of(plain) - start, dim=0) > 0.99


def test_pictures_between_updates_and_a_saved_state_change_no_bit():
    group_of = GROUPS["two sizes, all lengths"]
    with determinism(True):
        whole = new_session(CONFIG)
        norms = train(whole, CONFIG, group_of, 0, 10)
        first = new_session(CONFIG)
        assert train(first, CONFIG, group_of, 0, 5) == norms[:5]
        first.make_room()
        first.base.transformer.eval()
        group = a_group(99, tokens=33).to(GPU)
        with torch.no_grad():
            predict_velocity(
                first.base.transformer, group.latents, group.sigma, group.prompt_embeds, group.pooled_projections
            )
        assert train(first, CONFIG, group_of, 5, 7) == norms[5:7]
        parts, _ = first.parts()
        assert all(t.isfinite().all() for part in parts.values() for t in part.values())
        assert train(first, CONFIG, group_of, 7, 10) == norms[7:]
        assert torch.equal(weights_of(first), weights_of(whole))


def test_a_state_is_read_without_memory_of_the_gpu_while_graphs_hold_theirs():
    session = new_session(CONFIG)
    train(session, CONFIG, GROUPS["two sizes, all lengths"], 0, 6)
    assert session.graphs is not None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts, _ = session.parts()
    assert session.graphs.num_graphs == 2
    assert {tensor.device.type for tensor in parts["optimizer"].values()} == {"cpu"}
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.parametrize("streaming", [Streaming(4), Streaming(6, slots=1, prefetch=False), Streaming(6)], ids=str)
def test_streamed_weights_are_copied_within_the_graph(streaming):
    group_of = GROUPS["two sizes, all lengths"]
    with determinism(True):
        streamed = new_session(CONFIG, streaming, "nothing")
        norms = train(streamed, CONFIG, group_of, 0, 8)
        assert streamed.graphs is not None
        assert streamed.graphs.num_graphs == 2
        resident = new_session(CONFIG, None, "nothing")
        assert train(resident, CONFIG, group_of, 0, 8) == norms
        assert torch.equal(weights_of(streamed), weights_of(resident))


def test_the_loader_may_page_lock_memory_while_a_graph_is_captured():
    done: list[torch.Tensor] = []
    a, recorder = torch.zeros(2**20, device=GPU), make_recorder(GPU, None)

    def work() -> None:
        import threading

        thread = threading.Thread(target=lambda: done.append(torch.zeros(2**22).pin_memory()))
        thread.start()
        thread.join()
        a.add_(1)

    repeat = recorder.record(work)
    assert a.sum() == 0
    repeat()
    repeat()
    assert a.mean() == 2
    assert done[0].is_pinned()
    recorder.release()


def peak_of(level: str, precision: str) -> steps.Measured:
    case = Case(precision, None, side=1024, num_text_tokens=256)
    config = TrainConfig(
        base_model_precision=precision, mixed_precision="bf16", lora=LoraConfig(rank=16, targets=("qkv",)),
        memory=MemoryConfig(activations=level, graph="auto"),
    )  # fmt: skip
    return steps.time_recipe(config, case, GPU, WIDE, 2, 2)


@pytest.mark.parametrize("level", ["nothing", "selective", "all"])
@pytest.mark.parametrize("precision", ["int8-quanto", "int8-dynamic"])
def test_the_predicted_peak_counts_the_graph(level, precision):
    result = in_a_new_process(peak_of, level, precision)
    assert result.plan.endswith("captured")
    assert result.predicted_gib == pytest.approx(result.reserved_gib, rel=0.10)
