"""What is done for AMD cards, as far as can be asked without one: torch says ROCm, and its calls are stood in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from k5cache.shared import console, device
from k5cache.shared.errors import K5Error, RunError
from k5train.forward import attention, checks, execute, ops
from k5train.forward.tiles import tile_for

GPU = torch.device("cuda")


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of AMD's whose number, 9.4, would be Hopper's."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "MI300X")
    device._warn_of_amd.cache_clear()
    return monkeypatch


def test_an_amd_card_is_called_cuda_and_is_named_once_as_untried(amd):
    said: list[str] = []
    amd.setattr(console, "warn", said.append)
    amd.setattr(torch.cuda, "set_device", lambda name: None)
    assert [device.pick_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda", "cuda", "cuda:0", "cpu"]
    (warning,) = said
    assert warning.startswith("MI300X is an AMD card, on which nothing was tried.")
    for name in ("hip", "rocm:0", "AMD"):
        with pytest.raises(K5Error) as caught:
            device.check_name(name)
        assert caught.value.fix == "Use auto, cuda, cuda:1 or cpu; AMD cards are called cuda too"


def test_its_numbers_are_not_taken_for_nvidias(amd):
    for flash, kernel, int_mm in ((True, True, False), (False, False, True)):
        amd.setattr(execute, "attention_works", lambda device, cudnn, works=flash: works or cudnn)
        amd.setattr(execute, "few_keys_work", lambda device: True)
        amd.setattr(execute, "lengths_work", lambda device, works=kernel: works)
        amd.setattr(ops, "kernel_works", lambda device, works=kernel: works)
        amd.setattr(execute, "gelu_works", lambda device: True)
        amd.setattr(execute, "modulations_work", lambda device: True)
        amd.setattr(execute, "rotary_works", lambda device, works=kernel: works)
        amd.setattr(checks, "int_mm_works", lambda device, works=int_mm: works)
        expected = (True, False, flash, flash and kernel, kernel)
        assert execute.choose_modes(GPU, "int8-dynamic") == expected
    amd.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    assert execute.choose_modes(GPU, "int8-dynamic").int8_dynamic  # it works, whatever its number is
    amd.setattr(checks, "int_mm_works", lambda device: False)
    with pytest.raises(RunError, match="MI300X has no int8 tensor cores that can be used here"):
        execute.choose_modes(GPU, "int8-dynamic")
    assert not execute.choose_modes(GPU, "int8-quanto").int8_dynamic
    amd.setattr(torch.version, "hip", None)
    amd.setattr(ops, "kernel_works", lambda device: True)
    with pytest.raises(RunError, match="has no int8 tensor cores"):  # NVIDIA's before Ampere
        execute.choose_modes(GPU, "int8-dynamic")


def test_kernels_with_lengths_and_without_are_judged_apart(monkeypatch):
    """Each kind has cases of its own: what one gets wrong does not turn the other off."""
    for broken in (True, False):
        asked: list[Any] = []

        def agrees(
            device: Any, num_queries: int, num_keys: int, given: Any, broken: bool = broken, asked=asked
        ) -> bool:
            asked.append(given)
            return (given is None) != broken

        monkeypatch.setattr(attention, "_agrees", agrees)
        kinds = (attention._few_keys_agree, attention._lengths_agree)
        assert [kind(GPU) for kind in kinds] == [not broken, broken]
        assert {given is None for given in asked} == {True, False}


def test_a_matmul_of_int8_that_torch_lacks_or_gets_wrong_is_not_used(monkeypatch):
    cpu = torch.device("cpu")
    for stand_in, works in (
        (lambda a, b: (a.double() @ b.double()).int(), True),
        (lambda a, b: (a.double() @ b.double()).int() + 1, False),
        (lambda a, b: (_ for _ in ()).throw(RuntimeError("_int_mm is not supported on this build")), False),
    ):
        checks.int_mm_works.cache_clear()
        monkeypatch.setattr(torch, "_int_mm", stand_in)
        assert checks.int_mm_works(cpu) == works
    checks.int_mm_works.cache_clear()


def test_the_tiles_of_amd_cards_fit_their_shared_memory():
    for rows in (1, 512, 513, 100_000):
        assert tile_for(rows, 9, is_rocm=True).shared_bytes <= 64 * 1024
        assert tile_for(rows, 9, is_rocm=True) == tile_for(rows, 11, is_rocm=True)
    assert tile_for(4096, 9, is_rocm=False) == (128, 128, 128, 4, 3)
    assert tile_for(4096, 8, is_rocm=False) == tile_for(4096, 12, is_rocm=False) == (128, 128, 64, 8, 3)
    assert tile_for(512, 9, is_rocm=False) == (64, 64, 128, 4, 4)
