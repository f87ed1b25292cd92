"""On a GPU: do the kernel, the compiled and streamed blocks and the planner hold what the CPU tests promise?"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from k5cache.shared.vram import left, limit
from k5train.adapter import attach
from k5train.base import architecture, random_weights
from k5train.base.prepared import load_prepared
from k5train.base.quantize import load_transformer
from k5train.bench import steps
from k5train.bench.case import Case, condition_for, inputs_for
from k5train.bench.one_step import OneStep, group_of, make_session
from k5train.bench.timing import time_steps
from k5train.forward import attention, feed_forward, modulations, ops, rotary
from k5train.forward.attention import attention_works
from k5train.forward.load import execute as make_execution
from k5train.forward.load import stream_weights
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.train import TrainConfig
from k5train.planning import memory, vram
from k5train.planning.memory import Plan, Streaming
from tests.new_process import in_a_new_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
# A few blocks of the real width: what is measured of one block holds for fifty.
WIDE = {**architecture.FULL_SIZE, "num_visual_blocks": 6, "num_text_blocks": 1}
CASE = Case("int8-quanto", None, side=512, num_text_tokens=77)


@pytest.fixture(autouse=True)
def _empty_gpu():
    yield
    gc.collect()  # a model's modules refer to one another: uncollected, they would count in the next test's peak
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def outcome(transformer: Any, case: Case = CASE) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    inputs, condition = inputs_for(case, WIDE, GPU), condition_for(case, WIDE, GPU)
    velocity = predict_velocity(transformer, *inputs, **condition)
    velocity.float().square().mean().backward()
    return {
        "velocity": velocity.detach(),
        **{n: p.grad for n, p in transformer.named_parameters() if p.grad is not None},
    }


def adapted(precision: Any, streamed: frozenset[int] = frozenset(), case: Case = CASE) -> Any:
    transformer = random_weights.random_transformer(case.config(WIDE), precision, GPU, streamed)
    attach.add_lora(transformer, LoraConfig(rank=16, targets=("official",)), seed=0)
    generator = torch.Generator(GPU).manual_seed(3)
    for parameter in attach.lora_parameters(transformer)[1::2]:
        parameter.data = torch.randn(parameter.shape, generator=generator, device=GPU) * 0.01
    return transformer.train()


def run(
    transformer: Any, precision: Any, level: Any = "nothing", execution: Any = "compiled", streaming: Any = None
) -> Any:
    plan = Plan((level,) * WIDE["num_visual_blocks"], streaming, {}, None, 0)
    stream_weights(transformer, plan, GPU)
    config = TrainConfig(base_model_precision=precision, memory=MemoryConfig(execution=execution))
    return make_execution(transformer, config, GPU, plan)


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], cosine: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert F.cosine_similarity(ours[name].flatten().float(), theirs[name].flatten().float(), dim=0) > cosine, name


def test_the_int8_kernel_is_exact_arithmetic_rounded_once():
    assert ops.kernel_works(GPU)


def test_hoppers_int8_kernel_is_exact_arithmetic_rounded_once():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    assert ops.hopper_works(GPU)


def test_scaled_weights_have_torchs_bits():
    from k5train.forward import kernels

    assert ops.scaling_works(GPU)
    every_byte = torch.arange(-128, 128, device=GPU).to(torch.int8).repeat(10)  # 2560, a row of the full-size model
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scale = torch.linspace(-0.1, 0.1, 101, device=GPU).to(dtype)[:, None]
        for weight in (every_byte.repeat(101, 1), every_byte.repeat(101, 1)[:, :2500]):
            scaled = kernels.scale_rows(weight, scale, torch.empty(weight.shape, dtype=dtype, device=GPU))
            assert torch.equal(scaled, scale * weight)


def test_gelu_rope_and_modulations_in_kernels_of_our_own_agree_with_torch():
    assert feed_forward.gelu_works(GPU)
    assert rotary.rotary_works(GPU)
    assert modulations.modulations_work(GPU)


def test_what_is_not_a_number_stays_so_in_int8():
    hidden = torch.randn(4, 10240, device=GPU).bfloat16()
    hidden[1, 77], hidden[2, 5] = float("nan"), float("inf")
    scales = torch.ops.k5.gelu_quantize(hidden, False)[1].flatten()
    assert torch.isfinite(scales).tolist() == [True, False, False, True]


def test_hopper_has_cudnn_attention():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    assert attention_works(GPU, cudnn=True)


def test_flash_attention_is_ours_too():
    assert attention_works(GPU, cudnn=False)


@pytest.mark.parametrize("num_keys", [1, 2, 20, 77, 128, 256, 300, 512])
def test_attention_over_few_keys_has_the_gradients_of_plain_attention_and_always_the_same_bits(num_keys):
    assert attention.few_keys_work(GPU)
    generator = torch.Generator(GPU).manual_seed(num_keys)
    for batch, num_queries in ((1, 1024), (2, 4030)):
        query, grad = (
            torch.randn(batch, num_queries, 3, 128, device=GPU, generator=generator).bfloat16() for _ in "qg"
        )
        keys, values = torch.randn(batch, num_keys, 6, 128, device=GPU, generator=generator).bfloat16().chunk(2, dim=2)
        leaves = [t.detach().requires_grad_() for t in (query, keys, values)]
        ours, again = (torch.autograd.grad(attention.attention(*leaves, cudnn=False), leaves, grad) for _ in range(2))
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        weights = torch.einsum("bnhd,blhd->bhnl", doubles[0], doubles[1]) / 128**0.5
        plain = torch.einsum("bhnl,blhd->bnhd", weights.softmax(-1), doubles[2])
        exact = torch.autograd.grad(plain, doubles, grad.double())
        for name, a, b, c in zip(("query", "key", "value"), ours, again, exact, strict=True):
            assert torch.equal(a, b), name
            # One key: its weight is 1 whatever the query, so these gradients are 0, up to the rounding of the output.
            scale = c.norm() if num_keys > 1 or name == "value" else grad.double().norm()
            assert (a.double() - c).norm() <= 5e-3 * scale, name  # bfloat16: 2.4e-3 on an H200


@pytest.mark.parametrize(
    "lengths", [(1, 2), (20, 77), (77, 256), (256, 1), (300, 511), (512, 512), (640, 1000)], ids=str
)
@pytest.mark.parametrize("num_queries", [4030, None], ids=["of a picture", "of the captions"])
def test_attention_to_padded_captions_is_that_to_each_alone_and_padding_is_never_read(lengths, num_queries):
    assert attention.lengths_work(GPU)
    room = 1024 if max(lengths) > 512 else 512
    generator = torch.Generator(GPU).manual_seed(sum(lengths))
    query, grad = (
        torch.randn(2, num_queries or room, 3, 128, device=GPU, generator=generator).bfloat16() for _ in "qg"
    )
    fused = torch.randn(2, room, 6, 128, device=GPU, generator=generator).bfloat16()
    for row, length in enumerate(lengths):
        fused[row, length:] = float("nan")
    keys, values = fused.chunk(2, dim=2)
    leaves = [t.detach().requires_grad_() for t in (query, keys, values)]
    data = torch.tensor(lengths, device=GPU, dtype=torch.int32)
    results = []
    for _ in range(2):
        dirty = [torch.full((2**24,), float("nan"), device=GPU) for _ in range(4)]
        del dirty  # what the kernels allocate next is full of NaN
        out = attention.attention(*leaves, cudnn=False, lengths=data)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    out, *grads = results[0]
    for row, length in enumerate(lengths):
        alone = [t[row : row + 1, : length if i else None].detach().requires_grad_() for i, t in enumerate(leaves)]
        doubles = [t.detach().double().requires_grad_() for t in alone]
        weights = torch.einsum("bnhd,blhd->bhnl", doubles[0], doubles[1]) / 128**0.5
        exact = torch.einsum("bhnl,blhd->bnhd", weights.softmax(-1), doubles[2])
        expected = [exact, *torch.autograd.grad(exact, doubles, grad[row : row + 1].double())]
        ours = [out[row : row + 1], grads[0][row : row + 1], *(g[row : row + 1, :length] for g in grads[1:])]
        for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
            # One key: its weight is 1 whatever the query, so the gradients of query and key are 0.
            scale = grad[row].double().norm() if length == 1 and i in (1, 2) else b.norm()
            assert (a.double() - b).norm() <= 5e-3 * scale, (row, i)
        assert not grads[1][row, length:].any()
        assert not grads[2][row, length:].any()


def test_captions_of_different_lengths_train_compiled_and_another_length_compiles_nothing():
    transformer = adapted("int8-quanto")
    run(transformer, "int8-quanto", execution="diffusers")
    inputs = inputs_for(replace(CASE, num_text_tokens=128), WIDE, GPU)

    def gradients(lengths: Any) -> dict[str, torch.Tensor]:
        transformer.zero_grad()
        padded = inputs[2].clone()
        padded[:, 77:] = 0
        predict_velocity(
            transformer, inputs[0], inputs[1], padded, inputs[3], text_lengths=lengths
        ).float().square().mean().backward()
        return {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}

    plain = gradients((77,))
    execution = run(transformer, "int8-quanto", "selective")
    assert execution.modes.padded
    length = torch.tensor([77], device=GPU, dtype=torch.int32)
    execution.warm_up(lambda: gradients(length))
    assert execution.is_compiled
    assert_near(gradients(length), plain, 0.999)
    with torch._dynamo.config.patch(error_on_recompile=True):
        length.fill_(20)
        shorter = gradients(length)
    assert all(g.isfinite().all() for g in shorter.values())


def test_a_caption_of_one_token_trains():
    transformer = adapted("int8-quanto")
    execution = run(transformer, "int8-quanto", "selective", execution="eager")
    outcome(transformer, replace(CASE, num_text_tokens=1))
    assert not execution.is_compiled


@pytest.mark.parametrize("level", ["nothing", "selective", "all"])
def test_compiled_blocks_give_the_plain_gradients(level):
    transformer = adapted("int8-quanto")
    run(transformer, "int8-quanto", execution="diffusers")
    plain = outcome(transformer)
    execution = run(transformer, "int8-quanto", level)
    execution.warm_up(lambda: outcome(transformer))
    assert execution.is_compiled
    assert_near(outcome(transformer), plain, 0.999)  # bfloat16 in other orders


@pytest.mark.parametrize("level", list(memory.LEVELS))
def test_what_is_compiled_for_a_level_is_found_again(level, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    transformer = adapted("int8-quanto")
    counts = []
    for _ in range(2):  # as in a new process
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        run(transformer, "int8-quanto", level).warm_up(lambda: outcome(transformer))
        counts.append({**counters["aot_autograd"], **counters["inductor"]})
    first, second = ({k: n for k, n in f.items() if "_cache_" in k and "async" not in k} for f in counts)
    assert first == {"autograd_cache_miss": 1, "autograd_cache_saved": 1, "fxgraph_cache_miss": 2}
    assert second == {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}


def test_int8_tensor_cores_stay_near_sixteen_bit_gradients():
    transformer = adapted("int8-dynamic")
    run(transformer, "int8-quanto", execution="eager")
    plain = outcome(transformer)
    run(transformer, "int8-dynamic")
    assert_near(outcome(transformer), plain, 0.99)


@pytest.mark.parametrize(
    "streaming", [Streaming(4), Streaming(6, slots=1, prefetch=False), Streaming(6, slots=4)], ids=str
)
def test_streamed_weights_give_the_resident_gradients_step_after_step(streaming):
    transformer = adapted("int8-quanto")
    run(transformer, "int8-quanto")
    resident = outcome(transformer)
    run(transformer, "int8-quanto", "attention", streaming=streaming)
    for _ in range(3):
        with torch.no_grad():
            predict_velocity(transformer, *inputs_for(CASE, WIDE, GPU))
        assert_near(outcome(transformer), resident, 0.9999)


def peak_of(level: str, precision: str) -> tuple[float, float | None]:
    """The peak that is planned for a step and what torch reserves for it, in GiB."""
    case = replace(CASE, precision=precision, side=1024)
    config = TrainConfig(
        base_model_precision=precision,
        lora=LoraConfig(rank=16, targets=("qkv",)),
        memory=MemoryConfig(activations=level),
    )
    plan = steps.plan_for(WIDE, config, GPU, (4096, 77), None)
    transformer = random_weights.random_transformer(WIDE, precision, GPU)
    attach.add_lora(transformer, config.lora, seed=0)
    step = OneStep(make_session(transformer, config, GPU, plan), config, group_of(inputs_for(case, WIDE, GPU)))
    timing = time_steps(step, step.warm_up, GPU, 2, 2)
    return plan.peak / 2**30, timing.reserved_gib


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-dynamic"])
@pytest.mark.parametrize("level", ["nothing", "attention", "selective", "matmuls", "all"])
def test_the_predicted_peak_is_within_ten_percent_of_the_measured(level, precision):
    predicted, reserved = in_a_new_process(peak_of, level, precision)
    assert predicted == pytest.approx(reserved, rel=0.10)


def test_a_limit_is_kept_and_lifted(toy_model):
    limit(GPU, 2 * 2**30)
    assert (left(GPU) or 0) <= 2 * 2**30
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(3 * 2**30, dtype=torch.uint8, device=GPU)
    limit(GPU, None)
    torch.empty(3 * 2**30, dtype=torch.uint8, device=GPU)


def test_the_prepared_base_arrives_whole_on_the_gpu(toy_model, tmp_path, monkeypatch):
    monkeypatch.setenv("K5_HOME", str(tmp_path))
    ours = load_prepared(toy_model, torch.bfloat16, GPU).state_dict()
    theirs = load_transformer(toy_model, "int8-quanto", torch.bfloat16, GPU).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {t.device.type for t in ours.values()} == {"cuda"}


def test_the_plan_of_this_card_fits_it():
    budget = vram.budget(GPU, None)
    assert budget is not None
    arch = memory.architecture(architecture.FULL_SIZE)
    work = steps.work_for(
        architecture.FULL_SIZE, TrainConfig(lora=LoraConfig(rank=16, targets=("qkv",))), (4096, 256), compiled=True
    )
    assert memory.make_plan(arch, work, budget).peak <= budget
