"""Is our attention torch's, bit for bit, and does nothing in a compiled block look as if it drew random numbers?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from k5train.forward import execute
from k5train.forward.attention import any_attention, attention, attention_works
from k5train.forward.block import Modes
from k5train.forward.execute import Execution
from k5train.planning.memory import Plan
from tests.toy_blocks import CPU, batch, model, outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_keys", [9, 5], ids=["over itself", "over a caption"])
def test_it_is_torchs_attention_forward_and_backward(dtype, num_keys):
    generator = torch.Generator().manual_seed(0)
    # As a block has them: keys and values are parts of one tensor.
    query = torch.randn(2, 9, 3, 16, generator=generator).to(dtype)
    fused = torch.randn(2, num_keys, 6, 16, generator=generator).to(dtype)
    results = []
    for is_ours in (True, False):
        leaves = [query.clone().requires_grad_(), fused.clone().requires_grad_()]
        key, value = leaves[1].chunk(2, dim=2)
        if is_ours:
            out = attention(leaves[0], key, value, cudnn=False)
        else:
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (leaves[0], key, value))).transpose(1, 2)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_attention_to_the_first_keys_of_each_row_is_attention_to_these_alone():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, n, 3, 16, generator=generator) for n in (9, 7, 7))
    out = any_attention(query, key, value, torch.tensor([3, 7], dtype=torch.int32))
    for row, length in enumerate((3, 7)):
        one = attention(query[row : row + 1], key[row : row + 1, :length], value[row : row + 1, :length], cudnn=False)
        torch.testing.assert_close(out[row : row + 1], one, rtol=1e-6, atol=1e-6)


def test_it_is_a_proper_op():
    query, key, value = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (4, 3, 3))
    out, logsumexp = torch.ops.k5.attention(*(t.detach() for t in (query, key, value)), None, False)
    given = [t.detach() for t in (torch.ones_like(out), query, key, value, out, logsumexp)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.k5.attention.default, (*given[1:4], None, False), test_utils=checks)
    torch.library.opcheck(torch.ops.k5.attention_backward.default, (*given, None, False), test_utils=checks)
    assert torch.autograd.gradcheck(
        functools.partial(attention, cudnn=False), [t.detach().double().requires_grad_() for t in (query, key, value)]
    )


def test_a_device_on_which_it_is_wrong_or_absent_is_found_out(monkeypatch):
    check = attention_works.__wrapped__
    assert check(CPU, False)
    monkeypatch.setattr("k5train.forward.attention.attention", lambda *inputs, cudnn: inputs[0] * 0.5)
    assert not check(CPU, False)

    def absent(*inputs: Any, cudnn: bool) -> Any:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr("k5train.forward.attention.attention", absent)
    assert not check(CPU, False)


def random_ops(toy_model: Path, level: str, modes: Modes, monkeypatch) -> set[str]:
    """The ops in the compiled blocks' graphs that torch marks as drawing random numbers."""
    names: set[str] = set()
    graphs = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        for node in graph.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                names.add(str(node.target))
            elif isinstance(node.target, torch._ops.HigherOrderOperator):  # keeps a generator's state
                names.add(node.target.name())
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    with monkeypatch.context() as patched:
        patched.setattr(execute.torch, "compile", functools.partial(torch.compile, backend=backend))
        torch._dynamo.reset()
        transformer = model(toy_model)
        plan = Plan((level,) * len(transformer.visual_transformer_blocks), None, {}, None, 0)  # type: ignore[arg-type]
        execution = Execution(transformer, plan, modes, compiled=True, device=CPU)
        outcome(transformer, execution.policies, batch(transformer))
    assert len(graphs) == 2  # forward and backward of a picture block
    return names


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=pytest.mark.long) for level in ("selective", "nothing", "attention", "all")]
)
def test_no_op_of_a_compiled_block_draws_random_numbers(toy_model, level, monkeypatch):
    assert random_ops(toy_model, level, Modes(int8_dynamic=False, cudnn=False), monkeypatch) == set()


@pytest.mark.long
def test_torchs_own_attention_would(toy_model, monkeypatch):
    plain = Modes(int8_dynamic=False, cudnn=False, flash=False)
    assert any("attention" in name for name in random_ops(toy_model, "attention", plain, monkeypatch))
