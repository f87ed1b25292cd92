"""What a deterministic run tells the compiler, as the compiler itself reads it. Bits: tests/gpu/test_resume_gpu.py"""

from __future__ import annotations

import sys
from contextlib import suppress
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
import torch.utils._triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from k5train.training.determinism import determinism

BY_THE_USER = {
    "max_autotune": True,
    "max_autotune_pointwise": True,
    "coordinate_descent_tuning": True,
    "benchmark_fusion": True,
    "triton.multi_kernel": 1,
}
BY_TIMING = ("autotune_pointwise", "max_autotune", "max_autotune_pointwise", "coordinate_descent_tuning")


def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What torch writes into each kernel that it generates now, of which its choice by timing depends."""
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(torch.utils._triton, "triton_hash_with_backend", lambda: "")  # without Triton there is none
    facts = TritonKernel.inductor_meta_common()
    return {name: facts.get(name, False) for name in ("deterministic", *BY_TIMING)}


@inductor.patch(BY_THE_USER)  # as TORCHINDUCTOR_MAX_AUTOTUNE=1 and the like do
def test_no_kernel_is_chosen_by_timing_even_if_the_user_asks_torch_for_it(monkeypatch):
    before = told(monkeypatch)
    assert before == {"deterministic": False, **dict.fromkeys(BY_TIMING, True)}
    with determinism(True):
        assert told(monkeypatch) == {"deterministic": True, **dict.fromkeys(BY_TIMING, False)}
        assert not any((inductor.max_autotune_gemm, inductor.benchmark_fusion, inductor.triton.multi_kernel))
    assert told(monkeypatch) == before
    with determinism(False):
        assert told(monkeypatch) == before


def test_compiled_code_that_was_chosen_by_timing_is_not_used_again(monkeypatch):
    """torch looks compiled code up by these settings too."""
    key = inductor.save_config_portable()["triton.autotune_pointwise"]
    with determinism(True):
        assert inductor.save_config_portable()["triton.autotune_pointwise"] is not key


def test_a_backward_pass_is_compiled_in_the_thread_that_has_these_settings():
    """Of what torch 2.13 and later are told, autograd's thread for a GPU knows nothing."""
    told = []

    def compiled(graph: torch.fx.GraphModule, inputs: object) -> object:
        told.append((inductor.deterministic, inductor.triton.autotune_pointwise))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=compiled, bw_compiler=compiled)
    with determinism(True):
        loss = torch.compile(lambda x: x.sin().sum(), backend=backend)(torch.ones(3, requires_grad=True))
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert told == [(True, False)] * 2


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_what_torch_was_told_before_is_told_again_after_an_error_too(mode):
    try:
        torch.set_deterministic_debug_mode(mode)
        before = torch.get_deterministic_debug_mode(), inductor.save_config_portable()
        with suppress(ZeroDivisionError), determinism(True):
            assert torch.get_deterministic_debug_mode() == 2
            raise ZeroDivisionError
        assert (torch.get_deterministic_debug_mode(), inductor.save_config_portable()) == before
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_torch_that_times_sums_too_is_named_where_blocks_are_compiled(monkeypatch, capsys, is_compiled):
    old = SimpleNamespace(triton=SimpleNamespace(autotune_pointwise=True), max_autotune=False)
    monkeypatch.setattr(torch._inductor, "config", old)
    monkeypatch.setitem(sys.modules, "torch._inductor.config", old)
    with determinism(True, is_compiled=is_compiled):
        assert old.triton.autotune_pointwise is False
    assert old.triton.autotune_pointwise is True
    assert ("chooses some compiled kernels by timing" in " ".join(capsys.readouterr().err.split())) is is_compiled
