"""Is every way to run the blocks the plain one? Lean, each memory level, compiled, streamed, int8 tensor cores."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from k5cache.shared.errors import DoesNotFit
from k5train.adapter import attach
from k5train.base.quantize import load_transformer
from k5train.forward import compile, execute, levels, load, stream
from k5train.forward.block import Linears, Modes, gather, project
from k5train.forward.execute import Execution, choose_modes
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import LEVELS, Plan, Streaming

CPU = torch.device("cpu")
PLAIN = Modes(int8_dynamic=False, cudnn=False)


def model(folder: Path, precision: Any = "int8-quanto", **adapter: Any) -> Any:
    """The toy transformer in float32 with an adapter whose every matrix has a gradient."""
    return adapt(load_transformer(folder, precision, torch.float32, CPU), **adapter)


def adapt(transformer: Any, targets: tuple[str, ...] = ("official",), dropout: float = 0.0, rank: int = 4) -> Any:
    """An adapter whose every matrix has a gradient, always the same."""
    attach.add_lora(transformer, LoraConfig(rank=rank, alpha=8, targets=targets, dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return transformer.train()


def batch(transformer: nn.Module, tokens: int = 7, side: int = 8, size: int = 2) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    config: Any = transformer.config
    return (
        torch.randn(size, 1, side, side, config.in_visual_dim, generator=g),
        torch.rand(size, generator=g),
        torch.randn(size, tokens, config.in_text_dim, generator=g),
        torch.randn(size, config.in_text_dim2, generator=g),
    )


def outcome(transformer: Any, policies: Any, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The velocity and every gradient of the adapter."""
    transformer.zero_grad()
    velocity = predict_velocity(transformer, *inputs, block_policies=policies)
    velocity.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach(), **grads}


def execution(transformer: Any, level: str = "nothing", streaming: Streaming | None = None, modes: Modes = PLAIN):
    count = len(transformer.visual_transformer_blocks)
    plan = Plan((level,) * count, streaming, {}, None, 0)  # type: ignore[arg-type]
    streamer = None
    if streaming:
        blocks = transformer.visual_transformer_blocks
        streamer = stream.Streamer([blocks[i] for i in stream.spread(count, streaming.num_blocks)], streaming, CPU)
    return Execution(transformer, plan, modes, compiled=False, device=CPU, streamer=streamer)


def assert_same(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], within: float) -> None:
    assert ours.keys() == plain.keys()
    for name in plain:
        difference = (ours[name] - plain[name]).norm() / plain[name].norm()
        assert difference <= within, (name, difference.item())


# diffusers rounds rotated queries and keys to bfloat16: float32 noise before it may turn a bit of 2^-8 after it.
WITHIN = 2e-3


@pytest.mark.parametrize("precision", ["int8-quanto", "no_change"])
@pytest.mark.parametrize("targets", ["official", "qkv", r".*visual.*attention\.to_query"])
def test_lean_blocks_are_diffusers_blocks_forward_and_backward(toy_model, precision, targets):
    transformer = model(toy_model, precision, targets=(targets,))
    plain = outcome(transformer, None, batch(transformer))
    assert_same(outcome(transformer, execution(transformer).policies, batch(transformer)), plain, WITHIN)


@pytest.mark.parametrize("level", list(LEVELS))
def test_what_a_block_keeps_never_changes_the_numbers(toy_model, level):
    transformer = model(toy_model)
    everything = outcome(transformer, execution(transformer, "all").policies, batch(transformer))
    assert_same(outcome(transformer, execution(transformer, level).policies, batch(transformer)), everything, 1e-6)


@pytest.mark.parametrize(
    "streaming", [Streaming(2), Streaming(3, slots=1, prefetch=False), Streaming(3, slots=3)], ids=str
)
def test_streamed_weights_give_the_same_numbers_step_after_step(toy_model, streaming):
    transformer = model(toy_model)
    count = len(transformer.visual_transformer_blocks)
    streaming = Streaming(min(streaming.num_blocks, count), streaming.slots, streaming.prefetch)
    inputs = batch(transformer)
    resident = outcome(transformer, execution(transformer).policies, inputs)
    streamed = execution(transformer, "selective", streaming)
    for _ in range(2):
        with torch.no_grad():  # a picture between two steps
            drawn = predict_velocity(transformer, *inputs, block_policies=streamed.policies)
        torch.testing.assert_close(drawn, resident["velocity"], rtol=0, atol=1e-6)
        assert_same(outcome(transformer, streamed.policies, inputs), resident, 1e-6)


def test_streamed_weights_have_one_copy_on_the_host_and_a_slot_on_the_device(toy_model):
    transformer = model(toy_model)
    streamer = execution(transformer, streaming=Streaming(2, slots=1)).streamer
    assert streamer is not None
    slot = streamer._slots[0].untyped_storage().data_ptr()
    block = transformer.visual_transformer_blocks[-1]
    held = {m.weight.untyped_storage().data_ptr() for m in block.modules() if isinstance(m, stream.Int8Linear)}
    assert held == {slot}


def test_streaming_more_than_the_host_has_is_refused(toy_model, monkeypatch):
    monkeypatch.setattr(stream, "free_ram", lambda: stream._HOST_RESERVE)
    with pytest.raises(DoesNotFit, match="host memory"):
        execution(model(toy_model), streaming=Streaming(2))


def test_a_run_that_streams_more_than_the_host_has_is_refused_before_it_loads(toy_model, monkeypatch):
    monkeypatch.setattr(stream, "free_ram", lambda: 2**30 + stream._HOST_RESERVE)
    monkeypatch.setattr(load, "load_transformer", None)
    plan = Plan(("nothing",) * 3, Streaming(3), {}, None, 2**30 + 1)
    with pytest.raises(DoesNotFit, match=r"takes 1\.0 GiB of host memory for weights, 3\.0 GiB is free") as caught:
        load.load(toy_model, TrainConfig(base_model_precision="int8-quanto"), CPU, plan)
    assert "Close other programs" in caught.value.fix


def test_linears_of_one_input_are_fused_without_a_second_copy(toy_model):
    transformer = model(toy_model)
    block = transformer.visual_transformer_blocks[0]
    gathered = gather(block, dropout=True)
    assert gathered is not None
    (qkv,) = gathered.self_attention.projections[0]
    attention: Any = block.self_attention
    parts = [attention.to_query, attention.to_key, attention.to_value]
    assert {p.base_layer.weight.untyped_storage().data_ptr() for p in parts} == {
        qkv.weight.untyped_storage().data_ptr()
    }
    again = gather(block, dropout=True)
    assert again is not None
    assert again.self_attention.projections[0][0].weight.data_ptr() == qkv.weight.data_ptr()


def test_dropout_drops_in_training_and_not_in_sampling(toy_model):
    transformer = model(toy_model, dropout=0.5)
    policies = execution(transformer).policies
    inputs = batch(transformer)

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return predict_velocity(transformer, *inputs, block_policies=policies)

    assert not torch.equal(velocity(), velocity())
    transformer.eval()
    torch.testing.assert_close(velocity(), predict_velocity(transformer, *inputs), rtol=0, atol=1e-4)


def test_a_block_that_is_not_known_runs_as_the_module_it_is(toy_model):
    transformer = model(toy_model)
    transformer.visual_transformer_blocks[1].self_attention.to_query.use_dora["default"] = True
    assert gather(transformer.visual_transformer_blocks[1], dropout=True) is None
    transformer.visual_transformer_blocks[1].self_attention.to_query.use_dora["default"] = False
    plain = outcome(transformer, None, batch(transformer))
    transformer.visual_transformer_blocks[1].self_attention.processor = Odd()
    assert_same(outcome(transformer, execution(transformer).policies, batch(transformer)), plain, WITHIN)


class Odd(execute.gather.__globals__["Kandinsky5AttnProcessor"]):  # type: ignore[misc]
    """A processor of somebody else's."""


def test_int8_tensor_core_arithmetic_stays_near_sixteen_bit_gradients(toy_model):
    transformer = model(toy_model)
    inputs = batch(transformer)
    near = outcome(transformer, execution(transformer, modes=choose_modes(CPU, "int8-dynamic")).policies, inputs)
    plain = outcome(transformer, execution(transformer).policies, inputs)
    for name in plain:
        cosine = torch.cosine_similarity(near[name].flatten(), plain[name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine.item())  # 7 bits a row of activations; random toy weights
    assert any(not torch.equal(near[name], plain[name]) for name in plain)


def test_one_compilation_takes_any_caption_picture_and_rank(toy_model, monkeypatch):
    # aot_eager: the whole of torch.compile but the code generator, which takes a minute a block on a CPU.
    compiling = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(execute.torch, "compile", compiling)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens, side, rank in ((7, 8, 4), (9, 12, 6), (12, 10, 3), (9, 8, 3)):
        transformer = model(toy_model, targets=("qkv",), rank=rank)
        plan = Plan(("selective",) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
        made = Execution(transformer, plan, PLAIN, compiled=True, device=CPU, any_rank=True)
        inputs = batch(transformer, tokens, side)
        assert_same(outcome(transformer, made.policies, inputs), outcome(transformer, None, inputs), WITHIN)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of a picture block


def test_a_block_is_compiled_at_the_plans_sizes_whatever_size_comes_first(toy_model, monkeypatch):
    compiled_at = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled_at.append({int(value.node.hint) for value in values if isinstance(value, torch.SymInt)})
        return graph.forward

    monkeypatch.setattr(execute.torch, "compile", functools.partial(torch.compile, backend=backend))
    transformer = model(toy_model, rank=16, dropout=0.5)
    for sizes, any_rank in (((64, 20), False), ((64, 20), True), ((16, 16), True)):
        plan = Plan(("all",) * len(transformer.visual_transformer_blocks), None, {}, None, 0, sizes)
        torch._dynamo.reset()
        compiled_at.clear()
        made = Execution(transformer, plan, PLAIN, compiled=True, device=CPU, any_rank=any_rank)
        for tokens, side in ((1, 4), (5, 8), (7, 6)):
            states = []
            for mode in (torch.no_grad, torch.enable_grad):
                torch.manual_seed(2)
                with mode():
                    predict_velocity(transformer, *batch(transformer, tokens, side), block_policies=made.policies)
                states.append(torch.get_rng_state())
            assert torch.equal(*states)  # compiling draws no random numbers
        # A caption of one token is a constant. A picture, a caption and a rank of one size would be taken for one.
        picture, caption, ranks = (64, 20, {16}) if sizes == (64, 20) else (17, 18, {16})
        once = [{picture}] * 2 + [{picture, caption}] * 2
        assert compiled_at == [found | (ranks if any_rank else set()) for found in once]


def test_compiling_in_mid_run_is_said_once_and_in_the_warm_up_not(toy_model, monkeypatch, capsys):
    monkeypatch.setattr(execute.torch, "compile", functools.partial(torch.compile, backend="eager"))
    transformer = model(toy_model)
    plan = Plan(("nothing", "all", "all"), None, {}, None, 0, (64, 20))
    torch._dynamo.reset()
    made = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    made.warm_up(lambda: outcome(transformer, made.policies, batch(transformer)))
    assert not capsys.readouterr().err
    for tokens, side in ((9, 12), (1, 8), (1, 4)):
        outcome(transformer, made.policies, batch(transformer, tokens, side))
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


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_traced_block_is_found_again_and_not_taken_for_another(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(levels, "run_block", one_linear)  # of a whole block the code alone takes a minute
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (16, 8), dtype=torch.int8, generator=generator)
    scale, down, up, x = (torch.randn(shape, generator=generator) for shape in ((16, 1), (2, 8), (16, 2), (1, 4, 8)))

    def gradients(run: Any, level: str, modes: Modes) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, down)]
        part = Linears(weight, scale, None, (leaves[1],), (up,), torch.tensor(1.0), 0.0)
        return torch.autograd.grad(run(leaves[0], None, x, None, x, part, modes, level).sum(), leaves)

    int8 = PLAIN._replace(int8_dynamic=True)
    found = []
    for level, modes in (("nothing", PLAIN), ("selective", PLAIN), ("nothing", int8), ("nothing", PLAIN)):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        compiled, plain = gradients(compile.compile_block(), level, modes), gradients(levels.run_at_level, level, modes)
        for ours, theirs in zip(compiled, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
        found.append({k: v for k, v in counters["aot_autograd"].items() if k.startswith("autograd_cache")})
    made = {"autograd_cache_miss": 1, "autograd_cache_saved": 1}
    assert found == [made, made, made, {"autograd_cache_hit": 1}]


def one_linear(x: torch.Tensor, text: Any, mask: Any, modulation: Any, rope: Any, part: Any, modes: Modes) -> Any:
    """Stands for ``run_block``."""
    return project(x, part, modes, "self_qkv").sin()[..., :8]


def test_what_the_cache_knows_a_block_by_changes_with_its_source(monkeypatch):
    import torch._inductor.config as inductor

    found = []
    for change in ("", "# another"):
        monkeypatch.setattr(compile.inspect, "getsource", lambda module, change=change: module.__name__ + change)
        compile.mark_opaque()
        found.append(dict(inductor.unsafe_marked_cacheable_functions))
    assert (
        found[0].keys()
        == found[1].keys()
        >= {
            "k5train.forward.levels.opaque_block",
            "k5train.forward.block.Block",
        }
    )
    assert not set(found[0].values()) & set(found[1].values())


def test_a_compiler_that_fails_leaves_one_line_and_eager_blocks(toy_model, monkeypatch, capsys):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(execute.torch, "compile", lambda run, **_: broken)
    transformer = model(toy_model)
    plan = Plan(("nothing",) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
    made = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    inputs = batch(transformer)
    made.warm_up(lambda: outcome(transformer, made.policies, inputs))
    assert not made.is_compiled
    assert "run eagerly" in (said := capsys.readouterr().err)
    assert "no ptxas" in said
    assert_same(outcome(transformer, made.policies, inputs), outcome(transformer, None, inputs), WITHIN)


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
    made = Execution(transformer, plan, PLAIN, compiled=True, device=CPU)
    made.warm_up(lambda: outcome(transformer, made.policies, inputs))
    assert made.is_compiled
    with torch.no_grad():  # a picture
        drawn = predict_velocity(transformer, *inputs, block_policies=made.policies)
    assert not made.is_compiled
    assert "run eagerly" in (said := capsys.readouterr().err)
    assert said.count("no ptxas") == 1
    plain = outcome(transformer, None, inputs)
    torch.testing.assert_close(drawn, plain["velocity"], rtol=0, atol=1e-3)
    assert_same(outcome(transformer, made.policies, inputs), plain, WITHIN)


def test_cudnn_attention_that_fails_is_given_up_before_the_compiler_is(toy_model, capsys):
    made = execution(model(toy_model), modes=Modes(int8_dynamic=False, cudnn=True))
    made._run_compiled = lambda *_: None  # type: ignore[assignment, return-value]

    def step() -> None:
        if made.modes.cudnn:
            raise RuntimeError("No available kernel")

    made.warm_up(step)
    assert made.is_compiled
    assert not made.modes.cudnn
    assert "No available kernel" in capsys.readouterr().err


def test_running_out_of_memory_while_compiling_is_no_reason_to_run_eagerly(toy_model):
    made = execution(model(toy_model))
    made._run_compiled = lambda *a: None  # type: ignore[assignment, return-value]

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        made.warm_up(step)


def test_adapters_switched_off_and_on_are_noticed(toy_model):
    transformer = model(toy_model)
    inputs, policies = batch(transformer), execution(transformer).policies
    transformer.eval()

    def velocity(policies: Any) -> torch.Tensor:
        with torch.no_grad():
            return predict_velocity(transformer, *inputs, block_policies=policies)

    adapted = velocity(policies)
    transformer.disable_adapters()
    torch.testing.assert_close(velocity(policies), velocity(None), rtol=0, atol=1e-4)
    assert (velocity(policies) - adapted).abs().max() > 1e-2
    transformer.enable_adapters()
    assert torch.equal(velocity(policies), adapted)


@pytest.mark.parametrize("level", ["nothing", "selective"])
def test_padded_captions_are_masked_as_in_the_plain_blocks(toy_model, level):
    transformer = model(toy_model)
    inputs = batch(transformer)
    ours = predict_velocity(
        transformer, *inputs, text_lengths=(7, 3), block_policies=execution(transformer, level).policies
    )
    plain = predict_velocity(transformer, *inputs, text_lengths=(7, 3))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    assert (plain - predict_velocity(transformer, *inputs)).abs().max() > 1e-3


def test_another_adapter_on_the_same_base_finds_the_streamed_weights(toy_model):
    transformer = model(toy_model)
    inputs = batch(transformer)
    resident = outcome(transformer, None, inputs)
    config = TrainConfig(memory=MemoryConfig(execution="eager"))
    plan = Plan(("nothing",) * len(transformer.visual_transformer_blocks), Streaming(2), {}, None, 0)
    load.stream_weights(transformer, plan, CPU)
    for _ in range(2):
        made = load.execute(transformer, config, CPU, plan)
        assert made is not None
        assert_same(outcome(transformer, made.policies, inputs), resident, WITHIN)
        transformer.unload_lora()
        adapt(transformer)
