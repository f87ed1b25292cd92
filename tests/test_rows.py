"""gelu with its quantising, and RoPE, as ops of our own: what blocks compute with them, and their kernels."""

from __future__ import annotations

import pytest
import sympy
import torch

from k5train.forward import block, choices, feed_forward, rotary
from k5train.planning.memory import LEVELS
from tests.toy_blocks import PLAIN, WITHIN, assert_same, batch, eager_execution, model, outcome


@pytest.mark.parametrize("level", list(LEVELS))
def test_blocks_compute_the_same_with_them(toy_model, level):
    transformer = model(toy_model)
    inputs = batch(transformer)
    expected = outcome(transformer, eager_execution(transformer).policies, inputs)
    execution = eager_execution(transformer, level, modes=PLAIN._replace(rows=True))
    # Twice, because autograd also rounds the gradients of what RoPE rounded.
    assert_same(outcome(transformer, execution.policies, inputs), expected, 2 * WITHIN)


@pytest.mark.parametrize("adapted", [(), ("ff_in",), ("ff_out",), ("ff_in", "ff_out")])
def test_a_feed_forward_on_int8_tensor_cores_is_its_two_linears(adapted):
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def linear(name: str, rows: int, columns: int, bias: bool) -> block.Linears:
        weight = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
        down, up = numbers(4, columns).requires_grad_(), numbers(rows, 4).requires_grad_()
        downs, ups = ((down,), (up,)) if name in adapted else ((), ())
        scale = numbers(rows, 1).abs() * 1e-3
        return block.Linears(weight, scale, numbers(rows) if bias else None, downs, ups, 0.5, 0.0)

    parts = linear("ff_in", 48, 16, bias=False), linear("ff_out", 16, 48, bias=True)
    x, grad = numbers(2, 9, 16).requires_grad_(), numbers(2, 9, 16)
    leaves = [x, *(t for part in parts for t in (*part.downs, *part.ups))]
    results = []
    for rows in (True, False):
        modes = PLAIN._replace(int8_dynamic=True, rows=rows)
        out = block.feed_forward(x, *parts, modes)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


def test_an_adapter_with_dropout_takes_the_plain_way(toy_model):
    transformer = model(toy_model, dropout=0.5)
    inputs = batch(transformer)
    modes = PLAIN._replace(int8_dynamic=True)
    outcomes = []
    for rows in (False, True):
        torch.manual_seed(0)
        policies = eager_execution(transformer, "all", modes=modes._replace(rows=rows)).policies
        outcomes.append(outcome(transformer, policies, inputs))
    assert_same(outcomes[1], outcomes[0], 0.05)  # numbers that RoPE rounds otherwise become other int8


def test_queries_and_keys_have_the_gradients_that_autograd_gives():
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rope, norms = numbers(2, 5, 1, 8, 2, 2), (numbers(16), numbers(16))
    fused, grads = numbers(2, 5, 3 * 48).requires_grad_(), [numbers(2, 5, 3, 16) for _ in "qkv"]
    ours = rotary.rotated(fused, rope, *norms)
    (d_fused,) = torch.autograd.grad(ours, fused, grads)
    query, key, value = rotary.heads_of(fused, 16)
    plain = [rotary.rotate(rotary.rms_norm(x, norm), rope) for x, norm in zip((query, key), norms, strict=True)]
    for a, b in zip(ours, (*plain, value), strict=True):
        assert torch.equal(a, b)
    (expected,) = torch.autograd.grad((*plain, value), fused, grads)
    # autograd rounds the rotated tensors' gradients to bfloat16, where the forward pass rounds: 2^-9 of each.
    torch.testing.assert_close(d_fused, expected, rtol=0, atol=8e-3 * expected.abs().max().item())


def test_only_what_the_adapters_need_is_returned():
    hidden, grad, scale = torch.randn(6, 32), torch.randn(6, 32), torch.rand(32, 1)
    for keep in (False, True):
        for outs in (torch.ops.k5.gelu_quantize(hidden, keep), torch.ops.k5.gelu_backward(grad, hidden, scale, keep)):
            assert [tuple(t.shape) for t in outs] == [(6, 32), (6, 1), (6, 32) if keep else (0,)]
    assert not feed_forward.gelu_works(torch.device("cpu"))
    assert not rotary.rotary_works(torch.device("cpu"))


@pytest.mark.parametrize(
    ("tiling", "config"),
    [
        ({"x": "rows", "r0_": 2560}, {"XBLOCK": 1, "R0_BLOCK": 512, "num_warps": 2, "num_stages": 1}),
        ({"x": 4096, "r0_": 3072}, {"XBLOCK": 1, "R0_BLOCK": 1024, "num_warps": 4, "num_stages": 1}),
        ({"x": 4096, "r0_": 10240}, None),  # wider
        ({"x": 4096, "r0_": 128}, None),  # stays in registers
        ({"x": 4096, "r0_": 2570}, None),  # no power of two divides it that is worth a step
        ({"x": 4096, "r0_": "width"}, None),  # not known
        ({"y": 2, "x": 4096, "r0_": 2560}, None),
    ],
)
def test_the_compiler_walks_along_a_row_in_steps_that_divide_it(tiling, config):
    from torch._inductor.codegen.triton import FixedTritonConfig

    groups = [{name: sympy.sympify(size) for name, size in tiling.items()}]
    chosen = choices.row_choices().triton_kernel_kwargs(None, None, groups, {"other": 1})
    assert chosen == {"other": 1} | ({"fixed_config": FixedTritonConfig(config)} if config else {})


def test_another_s_choices_are_left_alone():
    import torch._inductor.config as inductor

    for before, after in ((None, choices.row_choices), (object, object)):
        with inductor.patch(inductor_choices_class=before):  # monkeypatch would take the setting away afterwards
            choices.choose_rows()
            assert inductor.inductor_choices_class is after
            assert choices.leave_rows() == (before is None)
            assert inductor.inductor_choices_class is before
