"""Do whole runs on fixed buffers train, measure, draw, stop and resume as others do? A stand-in takes graphs' place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k5cache.shared.errors import DoesNotFit
from k5train.forward.execute import Execution
from k5train.options.memory import MemoryConfig
from k5train.options.objective import ObjectiveConfig, RouteConfig, TreadConfig
from k5train.options.validation import ValidationConfig
from k5train.planning import plan
from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state
from k5train.training import loop, recorder, session
from k5train.training.graph import GraphedPasses
from tests.runs import CONFIG, go_on, lora_of, metrics_of, numbers, same, start_run, state_of

STEPS = replace(
    CONFIG, steps=6, checkpoint_every=4, lora=replace(CONFIG.lora, dropout=0.0), base_model_precision="int8-quanto",
    deterministic=True, memory=MemoryConfig(execution="eager", graph="auto"), gradient_accumulation_steps=2,
    validation=ValidationConfig(prompts=("",), every=4, num_inference_steps=1, width=64, height=64, held_out_every=3,
                                split=0.2, held_out_sigmas=1),
)  # fmt: skip
STOP = 3
"""The step after which a run is interrupted."""
ROUTED = "groups of one length, routes"
RUNS = {
    ROUTED: replace(STEPS, tread=TreadConfig(routes=(RouteConfig(0.5, 1, 1),))),
    "masked captions, weights, huber": replace(
        STEPS, unequal_captions="mask", objective=ObjectiveConfig(loss_type="huber", weighting="bell")
    ),
}


class Captures:
    """Which of the runs' passes are recorded. ``fails``: the first attempt runs out of memory."""

    def __init__(self) -> None:
        self.recorded, self.repeated, self.released, self.fails, self.holds = 0, 0, 0, False, False

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.recorded, self.holds = self.recorded + 1, True

        def repeat() -> None:
            self.repeated += 1
            work()

        return repeat

    def release(self) -> None:
        self.released, self.holds = self.released + 1, False


@pytest.fixture
def captures(monkeypatch) -> Captures:
    """Runs are planned and set up as on a GPU, and captured by this."""
    seen = Captures()
    for module in (plan, session):
        monkeypatch.setattr(module, "why_no_graph", lambda *_: None)
    monkeypatch.setattr(session, "make_recorder", lambda *_: seen)
    monkeypatch.setattr(
        session, "GraphedPasses", lambda *arguments: GraphedPasses(*arguments[:-1], may_capture=lambda: True)
    )
    return seen


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.mark.parametrize(
    "config", [pytest.param(config, id=name, marks=[pytest.mark.long] * (config is not RUNS[ROUTED]))
               for name, config in RUNS.items()]
)  # fmt: skip
def test_a_run_ends_with_the_same_bits_captured_or_not_and_resumed_either_way(
    tmp_path, cache, toy_model, monkeypatch, captures, capsys, config
):
    start_run(tmp_path / "captured", cache, toy_model, config)
    assert captures.repeated > 8
    assert captures.released >= 3  # before the measurements after steps 3 and 6, and the pictures after step 4
    ours, accumulate, done = tmp_path / "captured", loop.accumulate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == STOP + 1:
            raise KeyboardInterrupt
        return accumulate(*args, **kwargs)

    # One half captured and one not, then the other way around: each half is seen both ways.
    for name, fails in (("a", False), ("b", True)):
        done.clear()
        captures.fails, repeated = fails, captures.repeated
        capsys.readouterr()
        with monkeypatch.context() as stopping:
            stopping.setattr(loop, "accumulate", interrupted)
            with pytest.raises(KeyboardInterrupt, match=f"saved at step {STOP}"):
                start_run(tmp_path / name, cache, toy_model, config)
        assert (captures.repeated == repeated) is fails
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("not enough memory to capture it") == int(fails)
        captures.fails, repeated = not fails, captures.repeated
        go_on(tmp_path / name)
        assert (captures.repeated > repeated) is fails
        assert same(state_of(tmp_path / name), state_of(ours))
        assert same(lora_of(tmp_path / name), lora_of(ours))
        assert numbers(metrics_of(tmp_path / name)) == numbers(metrics_of(ours))


def test_it_is_near_the_run_that_takes_each_pass_as_it_comes(tmp_path, cache, toy_model, captures, monkeypatch):
    optim = replace(STEPS.optim, lr_scheduler="constant")
    config = replace(STEPS, steps=4, validation=ValidationConfig(), optim=optim)
    start_run(tmp_path / "captured", cache, toy_model, config)
    saved = latest_state(Run(tmp_path / "captured").state)
    assert saved is not None
    assert saved.facts["plan"]["is_captured"] is True
    for module in (plan, session):
        monkeypatch.setattr(module, "why_no_graph", lambda *_: "it is off")
    start_run(tmp_path / "plain", cache, toy_model, config)
    for ours, plain in zip(metrics_of(tmp_path / "captured"), metrics_of(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(
            plain["loss"], rel=2e-3
        )  # padding in other kernels, and AdamW's first steps
        assert ours["rows"] == plain["rows"]
    go_on(tmp_path / "captured", steps=5)  # with the saved plan, and no graph: the machine changed
    assert metrics_of(tmp_path / "captured")[-1]["step"] == 5


def test_out_of_memory_between_captured_steps_gives_their_memory_back_and_then_saves(
    tmp_path, cache, toy_model, captures, monkeypatch
):
    config = replace(STEPS, validation=ValidationConfig())
    accumulate, save_state, done, seen = loop.accumulate, loop.save_state, [], []

    def full(*args: Any, **kwargs: Any) -> Any:
        done.append(captures.released)
        if len(done) == STOP + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(*args, **kwargs)

    def noted(*args: Any) -> Any:
        seen.append(captures.released)
        return save_state(*args)

    monkeypatch.setattr(loop, "accumulate", full)
    monkeypatch.setattr(loop, "save_state", noted)
    with pytest.raises(DoesNotFit, match="ran out of memory"):
        start_run(tmp_path / "run", cache, toy_model, config)
    assert captures.repeated > 0
    assert seen == [done[-1] + 1]
    saved = latest_state(Run(tmp_path / "run").state)
    assert saved is not None
    assert saved.progress.step == STOP


def test_a_run_that_planned_for_less_gives_its_graphs_back_at_its_end(
    tmp_path, cache, toy_model, captures, monkeypatch
):
    """As the next run of a sweep needs their memory."""
    left = iter([True])

    def warm_up(execution: Any, step: Callable[[], object]) -> None:
        if next(left, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        step()

    monkeypatch.setattr(Execution, "warm_up", warm_up)
    monkeypatch.setattr(loop, "plan_for_less", lambda old, config: replace(old, graphs=session._graphs(old, config)))
    start_run(tmp_path / "run", cache, toy_model, replace(STEPS, validation=ValidationConfig()))
    assert captures.repeated > 0
    assert not captures.holds


def test_what_cublas_keeps_in_the_pool_of_graphs_goes_with_them(monkeypatch):
    """A workspace that lived on would hold the pool, and every session of a process would leave one behind."""
    order: list[str] = []
    for owner, name in ((torch._C, "_cuda_clearCublasWorkspaces"), (torch.cuda, "empty_cache"),
                        (torch.cuda, "synchronize")):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *_, name=name: order.append(name), raising=False)
    graphs = object.__new__(recorder.CudaGraphs)  # as it is after a capture; there is no GPU here
    graphs.device, graphs._pool = torch.device("cuda"), object()
    graphs._graphs = [SimpleNamespace(reset=lambda: order.append("reset"))]
    graphs.release()
    graphs.release()
    assert order == ["synchronize", "reset", "_cuda_clearCublasWorkspaces", "empty_cache"]


@pytest.mark.parametrize("is_ended", [True, False], ids=["out of memory in it", "it cannot be ended"])
def test_a_capture_that_breaks_off_leaves_the_stream_and_the_pool_as_they_were(monkeypatch, is_ended):
    """Where it cannot be ended torch restores neither: the pool's memory would be lost to the passes that follow."""
    order: list[object] = []
    stream, pool = object(), (0, 1)

    class Capture:
        def __init__(self, graph: object, **options: object) -> None:
            assert options["pool"] == pool

        def __enter__(self) -> None:
            order.append("begin")

        def __exit__(self, *_: object) -> None:
            if not is_ended:
                raise RuntimeError("operation failed due to a previous error during capture")

    def end(*_: object) -> None:
        if is_ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        order.append("end")

    fakes: list[tuple[Any, str, Any]] = [
        (torch.cuda, "CUDAGraph", lambda: SimpleNamespace(reset=lambda: order.append("reset"))),
        (torch.cuda, "graph", Capture), (torch.cuda, "graph_pool_handle", lambda: pool),
        (torch.cuda, "current_stream", lambda *_: stream), (torch.cuda, "set_stream", order.append),
        (torch._C, "_cuda_endAllocateToPool", end),
        (torch._C, "_cuda_releasePool", lambda *given: order.append(("release", given))),
        (torch._C, "_cuda_clearCublasWorkspaces", lambda: None),
    ]  # fmt: skip
    for owner, name, fake in fakes:
        monkeypatch.setattr(owner, name, fake, raising=False)
    graphs = object.__new__(recorder.CudaGraphs)
    graphs.device, graphs._pool, graphs._stream, graphs.streamer, graphs._graphs = (
        torch.device("cuda"),
        None,
        1,
        None,
        [],
    )

    def work() -> None:
        raise torch.OutOfMemoryError("no") if is_ended else RuntimeError("not permitted")

    with pytest.raises(RuntimeError):
        graphs.record(work)
    given_back = [] if is_ended else ["end", ("release", (0, pool))]
    assert order == ["begin", stream, *given_back, "reset"]


def test_the_stand_in_does_work_again():
    done: list[int] = []
    again = recorder.make_recorder(torch.device("cpu"), None)
    repeat = again.record(partial(done.append, 1))
    assert done == []
    repeat()
    repeat()
    assert done == [1, 1]
    again.release()
