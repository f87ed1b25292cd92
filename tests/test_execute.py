"""Does every way to run the blocks give the numbers of the plain one? Each memory level, streamed, masked, int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from k5cache.shared.errors import DoesNotFit
from k5train.base.architecture import FULL_SIZE
from k5train.forward import execute, load, ops, stream
from k5train.forward.block import gather
from k5train.forward.execute import choose_modes
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.memory import MemoryConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import LEVELS, Plan, Streaming
from tests.toy_blocks import CPU, WITHIN, adapt, assert_same, batch, eager_execution, model, outcome


@pytest.mark.parametrize("precision", ["int8-quanto", "no_change"])
@pytest.mark.parametrize("targets", ["official", "qkv", r".*visual.*attention\.to_query"])
def test_lean_blocks_are_diffusers_blocks_forward_and_backward(toy_model, precision, targets):
    transformer = model(toy_model, precision, targets=(targets,))
    plain = outcome(transformer, None, batch(transformer))
    assert_same(outcome(transformer, eager_execution(transformer).policies, batch(transformer)), plain, WITHIN)


@pytest.mark.parametrize("level", list(LEVELS))
def test_what_a_block_keeps_never_changes_the_numbers(toy_model, level):
    transformer = model(toy_model)
    everything = outcome(transformer, eager_execution(transformer, "all").policies, batch(transformer))
    assert_same(
        outcome(transformer, eager_execution(transformer, level).policies, batch(transformer)), everything, 1e-6
    )


@pytest.mark.parametrize(
    "streaming", [Streaming(2), Streaming(3, slots=1, prefetch=False), Streaming(3, slots=3)], ids=str
)
def test_streamed_weights_give_the_same_numbers_step_after_step(toy_model, streaming):
    transformer = model(toy_model)
    count = len(transformer.visual_transformer_blocks)
    streaming = Streaming(min(streaming.num_blocks, count), streaming.slots, streaming.prefetch)
    inputs = batch(transformer)
    resident = outcome(transformer, eager_execution(transformer).policies, inputs)
    streamed = eager_execution(transformer, "selective", streaming)
    for _ in range(2):
        with torch.no_grad():  # a picture between two steps
            drawn = predict_velocity(transformer, *inputs, block_policies=streamed.policies)
        torch.testing.assert_close(drawn, resident["velocity"], rtol=0, atol=1e-6)
        assert_same(outcome(transformer, streamed.policies, inputs), resident, 1e-6)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_training_pass_ends_as_it_may_begin_with_the_first_weights_in_place(toy_model, slots, monkeypatch):
    transformer = model(toy_model)
    streamed = eager_execution(transformer, "nothing", Streaming(3, slots=slots))
    streamer, inputs = streamed.streamer, batch(transformer)
    assert streamer is not None
    expected = outcome(transformer, streamed.policies, inputs)
    with torch.no_grad():
        predict_velocity(transformer, *inputs, block_policies=streamed.policies)
    copied: list[int] = []
    monkeypatch.setattr(streamer, "_hosts", Noting(streamer._hosts, copied))
    streamer.start_over()
    assert copied == list(range(slots))
    copied.clear()
    for _ in range(2):  # what a graph that was captured after start_over repeats
        with streamer.joined():
            assert_same(outcome(transformer, streamed.policies, inputs), expected, 0.0)
    assert streamer._place_in == list(range(slots))
    one_pass = [*range(slots, 3), *range(2 - slots, -1, -1)]  # forward and back, and none to begin with
    assert copied == 2 * one_pass


def test_weights_that_share_an_input_are_fused_before_the_first_pass(toy_model):
    transformer = model(toy_model)
    config = TrainConfig(
        base_model_precision="int8-quanto", mixed_precision="fp32", memory=MemoryConfig(execution="eager")
    )
    plan = Plan(("nothing",) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
    load.execute(transformer, config, CPU, plan)
    for block in (*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks):
        parts = [block.self_attention.to_query, block.self_attention.to_key, block.self_attention.to_value]
        assert len({part.base_layer.weight.untyped_storage().data_ptr() for part in parts}) == 1


class Noting(list):
    """A list that notes which of its entries are read."""

    def __init__(self, entries, read: list[int]) -> None:
        super().__init__(entries)
        self.read = read

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_streamed_weights_have_one_copy_on_the_host_and_a_slot_on_the_device(toy_model):
    transformer = model(toy_model)
    streamer = eager_execution(transformer, streaming=Streaming(2, slots=1)).streamer
    assert streamer is not None
    slot = streamer._slots[0].untyped_storage().data_ptr()
    block = transformer.visual_transformer_blocks[-1]
    pointers = {m.weight.untyped_storage().data_ptr() for m in block.modules() if isinstance(m, stream.Int8Linear)}
    assert pointers == {slot}


def test_streaming_more_than_the_host_has_is_refused(toy_model, monkeypatch):
    monkeypatch.setattr(stream, "free_ram", lambda: stream._HOST_RESERVE)
    with pytest.raises(DoesNotFit, match="host memory"):
        eager_execution(model(toy_model), streaming=Streaming(2))


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
    policies = eager_execution(transformer).policies
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
    assert_same(outcome(transformer, eager_execution(transformer).policies, batch(transformer)), plain, WITHIN)


class Odd(execute.gather.__globals__["Kandinsky5AttnProcessor"]):  # type: ignore[misc]
    """A processor that we do not know."""


def test_int8_tensor_core_arithmetic_stays_near_sixteen_bit_gradients(toy_model):
    transformer = model(toy_model)
    inputs = batch(transformer)
    near = outcome(transformer, eager_execution(transformer, modes=choose_modes(CPU, "int8-dynamic")).policies, inputs)
    plain = outcome(transformer, eager_execution(transformer).policies, inputs)
    for name in plain:
        cosine = torch.cosine_similarity(near[name].flatten(), plain[name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine.item())  # 7 bits a row of activations; random toy weights
    assert any(not torch.equal(near[name], plain[name]) for name in plain)


def test_adapters_switched_off_and_on_are_noticed(toy_model):
    transformer = model(toy_model)
    inputs, policies = batch(transformer), eager_execution(transformer).policies
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
        transformer, *inputs, text_lengths=(7, 3), block_policies=eager_execution(transformer, level).policies
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
        execution = load.execute(transformer, config, CPU, plan)
        assert execution is not None
        assert_same(outcome(transformer, execution.policies, inputs), resident, WITHIN)
        transformer.unload_lora()
        adapt(transformer)


def test_the_kernel_gets_fused_adapters_only_where_no_tile_spans_two():
    assert ops.parts_into_tiles(3 * FULL_SIZE["model_dim"], 3)
    assert ops.parts_into_tiles(3 * 48, 3)
    assert not ops.parts_into_tiles(3 * 72, 3)
    assert ops.parts_into_tiles(72, 1)
