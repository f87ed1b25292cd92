"""GPUs: those that the driver lists and the variable names, and what is said about a number of them that cannot be."""

from __future__ import annotations

import os
import stat

import pytest

from k5cache.shared import gpus
from k5cache.shared.errors import K5Error

LISTING = (
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000)\nGPU 1: NVIDIA A100 (UUID: GPU-bbbb2222-0000)\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-cccc)\n  MIG 3g.20gb     Device  1: (UUID: MIG-dddd)\n"
)


@pytest.fixture
def three(monkeypatch):
    """A machine with a GPU and another one that is divided in two."""
    monkeypatch.setattr(gpus, "_nvidia", lambda: gpus.listed(LISTING))


def test_gpus_are_those_that_the_driver_lists_and_the_variable_names():
    slots = gpus.listed(LISTING)
    assert [(slot.key, slot.words) for slot in slots] == [
        ("GPU-aaaa1111-0000", "GPU 0"), ("MIG-cccc", "GPU 1"), ("MIG-dddd", "GPU 1"),
    ]  # fmt: skip
    assert slots[0].env == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa1111-0000"}
    assert slots[2].name == "NVIDIA A100, MIG 3g.20gb"
    for variable, numbers in (
        (None, [0, 1, 2]), ("0", [0]), ("MIG-dddd, 0", [2, 0]), ("GPU-aaaa", [0]), ("", []), ("-1", []),
        ("0,7,1", [0]), ("0,0", []), ("0,GPU-aaaa", []), ("1", [1]), ("GPU-", []), ("NoDevFiles", []),
    ):  # fmt: skip
        assert gpus.visible(slots, variable) == tuple(slots[n] for n in numbers), variable


def test_a_beginning_that_may_mean_several_gpus_names_none_as_in_the_driver():
    alike = gpus.listed(LISTING.replace("MIG-dddd", "MIG-cccd"))
    for variable, numbers in (("MIG-ccc", []), ("0,MIG-ccc", [0]), ("MIG-cccd,MIG-cccc", [2, 1])):
        assert gpus.visible(alike, variable) == tuple(alike[n] for n in numbers), variable


def test_what_a_person_wrote_into_the_variable_is_passed_on_as_it_is(three):
    # A number counts in CUDA's order, which need not be that of the driver's tool.
    for variable, keys in (("1, 0", ("1", "0")), ("MIG-dd,0,9", ("MIG-dd", "0")), ("", ())):
        assert gpus.visible_gpus({"CUDA_VISIBLE_DEVICES": variable}) == keys
    assert gpus.visible_gpus({}) == ("GPU-aaaa1111-0000", "MIG-cccc", "MIG-dddd")
    assert gpus.choose_gpus(2, {}) == ("GPU-aaaa1111-0000", "MIG-cccc")


@pytest.mark.parametrize(
    ("count", "env", "problem", "fix"),
    [
        (4, {}, "--gpus 4: this machine has 3 GPUs", "Use --gpus 3"),
        (0, {}, "--gpus 0 is not a number of GPUs", "Give 1 or more"),
        (-2, {}, "--gpus -2 is not a number of GPUs", "Give 1 or more"),
        (2, {"CUDA_VISIBLE_DEVICES": "1"}, "--gpus 2: CUDA_VISIBLE_DEVICES=1 shows 1 of this machine's 3 GPUs",
         "Use --gpus 1, or change CUDA_VISIBLE_DEVICES"),
        (1, {"CUDA_VISIBLE_DEVICES": ""}, "--gpus 1: CUDA_VISIBLE_DEVICES= shows 0 of this machine's 3 GPUs",
         "Leave --gpus out, or change CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_a_number_of_gpus_that_cannot_be_is_refused(three, count, env, problem, fix):
    with pytest.raises(K5Error) as raised:
        gpus.choose_gpus(count, env)
    assert raised.value.problem == problem
    assert raised.value.fix.startswith(fix)


def test_a_machine_without_a_gpu_says_who_was_asked(monkeypatch):
    monkeypatch.setattr(gpus, "_nvidia", tuple)
    monkeypatch.setattr(gpus, "_amd", tuple)
    assert gpus.visible_gpus({}) == ()
    with pytest.raises(K5Error, match="--gpus 2: neither nvidia-smi nor AMD's driver lists a GPU here"):
        gpus.choose_gpus(2, {})


def test_cards_of_amd_are_named_by_hips_variable_unless_only_cudas_is_set(monkeypatch):
    two = tuple(gpus.Slot(str(n), n, "an AMD GPU", gpus.AMD) for n in range(2))
    monkeypatch.setattr(gpus, "_nvidia", tuple)
    monkeypatch.setattr(gpus, "_amd", lambda: two)
    for env, variable, keys in (
        ({}, "HIP_VISIBLE_DEVICES", ("0", "1")),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "CUDA_VISIBLE_DEVICES", ("1",)),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, "HIP_VISIBLE_DEVICES", ("0",)),
    ):
        assert (gpus.variable_of(env), gpus.visible_gpus(env)) == (variable, keys)


def test_amds_runtime_hides_cards_before_the_others_are_counted(tmp_path, monkeypatch):
    """Slurm sets it. In torch too, HIP_VISIBLE_DEVICES counts among those that ROCR_VISIBLE_DEVICES shows."""
    for number, properties in enumerate(
        ("simd_count 0\ncpu_cores_count 16\n", *(f"simd_count 304\nunique_id {n}\n" for n in (0xABC, 0xDEF)))
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(properties)
    monkeypatch.setattr(gpus, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(gpus, "_nvidia", tuple)
    monkeypatch.setattr(gpus.os, "access", lambda *arguments: True)
    gpus._amd.cache_clear()
    try:
        for env, keys in (
            ({}, ("0", "1")), ({"ROCR_VISIBLE_DEVICES": "1"}, ("0",)), ({"ROCR_VISIBLE_DEVICES": "1,0"}, ("0", "1")),
            ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000DEF"}, ("0",)), ({"ROCR_VISIBLE_DEVICES": ""}, ()),
            ({"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1"}, ("1",)),
            ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, ()),
        ):  # fmt: skip
            assert gpus.visible_gpus(env) == keys, env
        problem = "--gpus 2: ROCR_VISIBLE_DEVICES=1 shows 1 of this machine's 2 GPUs"
        with pytest.raises(K5Error, match=f"^{problem}\nUse --gpus 1, or change ROCR_VISIBLE_DEVICES$"):
            gpus.choose_gpus(2, {"ROCR_VISIBLE_DEVICES": "1"})
    finally:
        gpus._amd.cache_clear()


@pytest.mark.skipif(os.name == "nt", reason="a script stands in for the driver's tool")
def test_the_drivers_tool_is_asked(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{LISTING.splitlines()[0]}\\n'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpus._nvidia.cache_clear()
    try:
        assert gpus.choose_gpus(1, {}) == ("GPU-aaaa1111-0000",)
    finally:
        gpus._nvidia.cache_clear()
