"""What a deterministic run tells the compiler, as the compiler itself reads it. Bits: tests/gpu/test_resume_gpu.py"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
import torch.utils._triton

from k5train.training.determinism import determinism

BY_TIMING = ("autotune_pointwise", "max_autotune", "max_autotune_pointwise", "coordinate_descent_tuning")


def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What torch writes into each kernel that it generates now, of which its choice by timing depends."""
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(torch.utils._triton, "triton_hash_with_backend", lambda: "")  # without Triton there is none
    facts = TritonKernel.inductor_meta_common()
    return {name: facts.get(name, False) for name in ("deterministic", *BY_TIMING)}


def test_no_kernel_is_chosen_by_timing_even_if_the_user_asks_torch_for_it(monkeypatch):
    for name in ("max_autotune", "max_autotune_pointwise", "coordinate_descent_tuning"):  # TORCHINDUCTOR_MAX_AUTOTUNE=1
        monkeypatch.setattr(inductor, name, True)
    before = told(monkeypatch)
    assert before == {"deterministic": False, **dict.fromkeys(BY_TIMING, True)}
    with determinism(True):
        assert told(monkeypatch) == {"deterministic": True, **dict.fromkeys(BY_TIMING, False)}
        assert inductor.max_autotune_gemm is False
    assert told(monkeypatch) == before
    with determinism(False):
        assert told(monkeypatch) == before


def test_compiled_code_that_was_chosen_by_timing_is_not_used_again(monkeypatch):
    """torch looks compiled code up by these settings too."""
    key = inductor.save_config_portable()["triton.autotune_pointwise"]
    with determinism(True):
        assert inductor.save_config_portable()["triton.autotune_pointwise"] is not key


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_torch_that_times_sums_too_is_named_where_it_has_a_gpu(monkeypatch, capsys, has_gpu):
    old = SimpleNamespace(triton=SimpleNamespace(autotune_pointwise=True), max_autotune=False)
    monkeypatch.setattr(torch._inductor, "config", old)
    monkeypatch.setitem(sys.modules, "torch._inductor.config", old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with determinism(True):
        assert old.triton.autotune_pointwise is False
    assert old.triton.autotune_pointwise is True
    assert ("chooses some compiled kernels by timing" in " ".join(capsys.readouterr().err.split())) is has_gpu
