"""Are blocks compiled once, found again at the next start, and run eagerly where the compiler fails?"""

from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch

from k5train.forward import compile, execute, levels
from k5train.forward.block import Linears, Modes, project
from k5train.forward.execute import Execution
from k5train.forward.predict_velocity import predict_velocity
from k5train.planning.memory import Plan
from tests.toy_blocks import CPU, PLAIN, WITHIN, assert_same, batch, eager_execution, model, outcome


@pytest.mark.long  # tests/gpu holds it in real runs
def test_one_compilation_takes_any_caption_picture_and_rank(toy_model, monkeypatch):
    # aot_eager: the whole of torch.compile but the code generator, which takes a minute a block on a CPU.
    compiling = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(execute.torch, "compile", compiling)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens, side, rank in ((7, 8, 4), (9, 12, 6), (12, 10, 3), (9, 8, 3)):
        transformer = model(toy_model, targets=("qkv",), rank=rank)
        plan = Plan(("selective",) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
        execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU, any_rank=True)
        inputs = batch(transformer, tokens, side)
        assert_same(outcome(transformer, execution.policies, inputs), outcome(transformer, None, inputs), WITHIN)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the one graph of a picture block


@pytest.mark.long  # 14 s; tests/gpu compiles the plan's sizes in every run
def test_a_block_is_compiled_at_the_plans_sizes_whatever_size_comes_first(toy_model, monkeypatch):
    compiled_at = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled_at.append({int(value.node.hint) for value in values if isinstance(value, torch.SymInt)})
        return graph.forward

    monkeypatch.setattr(execute.torch, "compile", functools.partial(torch.compile, backend=backend))
    transformer = model(toy_model, rank=16, dropout=0.5)
    for sizes, any_rank in (((64, 20), False), ((16, 16), True)):
        plan = Plan(("all",) * len(transformer.visual_transformer_blocks), None, {}, None, 0, sizes)
        torch._dynamo.reset()
        compiled_at.clear()
        execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU, any_rank=any_rank)
        for tokens, side in ((1, 4), (5, 8), (7, 6)):
            states = []
            for mode in (torch.no_grad, torch.enable_grad):
                torch.manual_seed(2)
                with mode():
                    predict_velocity(transformer, *batch(transformer, tokens, side), block_policies=execution.policies)
                states.append(torch.get_rng_state())
            assert torch.equal(*states)  # compiling draws no random numbers
        # A caption of one token is a constant. Equal sizes of picture, caption and rank would become one symbol.
        picture, caption, ranks = (64, 20, {16}) if sizes == (64, 20) else (17, 18, {16})
        expected = [{picture}] * 2 + [{picture, caption}] * 2
        assert compiled_at == [sizes_of_graph | (ranks if any_rank else set()) for sizes_of_graph in expected]


def test_blocks_of_every_level_share_one_compilation_where_nothing_is_kept(toy_model, monkeypatch):
    monkeypatch.setattr(execute.torch, "compile", functools.partial(torch.compile, backend="eager"))
    transformer = model(toy_model)
    plan = Plan(("nothing", "selective", "all"), None, {}, None, 0, (64, 20))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    inputs = batch(transformer)
    with torch.no_grad():  # a picture, or a held-out loss
        drawn = predict_velocity(transformer, *inputs, block_policies=execution.policies)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain = outcome(transformer, None, inputs)
    torch.testing.assert_close(drawn, plain["velocity"], rtol=0, atol=1e-3)


def test_compiling_in_mid_run_is_said_once_and_in_the_warm_up_not(toy_model, monkeypatch, capsys):
    monkeypatch.setattr(execute.torch, "compile", functools.partial(torch.compile, backend="eager"))
    transformer = model(toy_model)
    plan = Plan(("nothing", "all", "all"), None, {}, None, 0, (64, 20))
    torch._dynamo.reset()
    execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    execution.warm_up(lambda: outcome(transformer, execution.policies, batch(transformer)))
    assert not capsys.readouterr().err
    for tokens, side in ((9, 12), (1, 8), (1, 4)):
        outcome(transformer, execution.policies, batch(transformer, tokens, side))
    said = capsys.readouterr().err
    assert said.startswith("Compiling for training on 2 x captions of one token: ")
    assert said.count("Compiling") == 1


def test_what_is_compiled_is_kept_where_the_base_is(tmp_path, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("K5_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/elsewhere")
    compile.compile_block()
    assert cache_dir() == "/tmp/elsewhere"  # a user's choice stands
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cache_dir()  # as the import of dynamo does: the environment now names a folder in /tmp
    compile.compile_block()
    assert cache_dir() == str(tmp_path / "compiled")


INT8 = PLAIN._replace(int8_dynamic=True)


@pytest.mark.long  # g++ takes 20 s
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_traced_block_is_found_again_and_not_taken_for_another(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Without vector instructions g++ takes half of the time. How kernels compute is not the question here.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    monkeypatch.setattr(levels, "run_block", one_linear)  # generating code for a whole block takes a minute
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (16, 8), dtype=torch.int8, generator=generator)
    scale, down, up, x = (torch.randn(shape, generator=generator) for shape in ((16, 1), (2, 8), (16, 2), (1, 4, 8)))

    def gradients(run: Any, level: str, modes: Modes) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, down)]
        part = Linears(weight, scale, None, (leaves[1],), (up,), torch.tensor(1.0), 0.0)
        return torch.autograd.grad(run(leaves[0], None, x, None, x, part, modes, level).sum(), leaves)

    counts = []
    for level, modes in (("nothing", PLAIN), ("selective", PLAIN), ("nothing", INT8), ("nothing", PLAIN)):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        compiled, plain = gradients(compile.compile_block(), level, modes), gradients(levels.run_at_level, level, modes)
        for ours, theirs in zip(compiled, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
        counts.append({k: v for k, v in counters["aot_autograd"].items() if k.startswith("autograd_cache")})
    compiled_anew = {"autograd_cache_miss": 1, "autograd_cache_saved": 1}
    assert counts == [compiled_anew, compiled_anew, compiled_anew, {"autograd_cache_hit": 1}]


def one_linear(x: torch.Tensor, text: Any, mask: Any, modulation: Any, rope: Any, part: Any, modes: Modes) -> Any:
    """Stands for ``run_block``."""
    return project(x, part, modes, "self_qkv").sin()[..., :8]


def test_what_the_cache_knows_a_block_by_changes_with_its_source(monkeypatch):
    import torch._inductor.config as inductor

    names_and_hashes = []
    for change in ("", "# another"):
        monkeypatch.setattr(compile.inspect, "getsource", lambda module, change=change: module.__name__ + change)
        compile.mark_opaque()
        names_and_hashes.append(dict(inductor.unsafe_marked_cacheable_functions))
    before, after = names_and_hashes
    assert before.keys() == after.keys()
    assert before.keys() >= {"k5train.forward.levels.opaque_block", "k5train.forward.block.Block"}
    assert not set(before.values()) & set(after.values())


def test_a_compiler_that_fails_leaves_one_line_and_eager_blocks(toy_model, monkeypatch, capsys):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(execute.torch, "compile", lambda run, **_: broken)
    transformer = model(toy_model)
    plan = Plan(("nothing",) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
    execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    inputs = batch(transformer)
    execution.warm_up(lambda: outcome(transformer, execution.policies, inputs))
    assert not execution.is_compiled
    assert "run eagerly" in (said := capsys.readouterr().err)
    assert "no ptxas" in said
    assert_same(outcome(transformer, execution.policies, inputs), outcome(transformer, None, inputs), WITHIN)


def test_a_compiler_that_fails_for_something_new_in_mid_run_leaves_eager_blocks_too(toy_model, monkeypatch, capsys):
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("no ptxas")
        return graph.forward

    monkeypatch.setattr(execute.torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    transformer = model(toy_model)
    inputs = batch(transformer)
    plan = Plan(("nothing",) * len(transformer.visual_transformer_blocks), None, {}, None, 0, (64, 20))
    execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    execution.warm_up(lambda: outcome(transformer, execution.policies, inputs))
    assert execution.is_compiled
    with torch.no_grad():  # a picture
        drawn = predict_velocity(transformer, *inputs, block_policies=execution.policies)
    assert not execution.is_compiled
    assert "run eagerly" in (said := capsys.readouterr().err)
    assert said.count("no ptxas") == 1
    plain = outcome(transformer, None, inputs)
    torch.testing.assert_close(drawn, plain["velocity"], rtol=0, atol=1e-3)
    assert_same(outcome(transformer, execution.policies, inputs), plain, WITHIN)


def test_cudnn_attention_that_fails_is_given_up_before_the_compiler_is(toy_model, capsys):
    execution = eager_execution(model(toy_model), modes=Modes(int8_dynamic=False, cudnn=True))
    execution._run_compiled = lambda *_: None  # type: ignore[assignment, return-value]

    def step() -> None:
        if execution.modes.cudnn:
            raise RuntimeError("No available kernel")

    execution.warm_up(step)
    assert execution.is_compiled
    assert not execution.modes.cudnn
    assert "No available kernel" in capsys.readouterr().err


def test_running_out_of_memory_while_compiling_is_no_reason_to_run_eagerly(toy_model):
    execution = eager_execution(model(toy_model))
    execution._run_compiled = lambda *a: None  # type: ignore[assignment, return-value]

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        execution.warm_up(step)


def test_captions_of_other_lengths_in_a_captured_step_compile_nothing(toy_model, monkeypatch):
    """Their buffer is as wide as the plan says, and their lengths are data."""
    compiling = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(execute.torch, "compile", compiling)
    transformer = model(toy_model)
    plan = Plan(("all",) * len(transformer.visual_transformer_blocks), None, {}, None, 0, (16, 16))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    execution = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    inputs = batch(transformer, 16, 8)
    given = [execution.policies, None]
    compiled = []
    for given_lengths in ((16, 16), (3, 9), (1, 2), (9, 1)):
        lengths = torch.tensor(given_lengths, dtype=torch.int32)
        ours, plain = (predict_velocity(transformer, *inputs, block_policies=p, text_lengths=lengths) for p in given)
        assert (ours - plain).norm() <= WITHIN * plain.norm()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled == [1] * 4
