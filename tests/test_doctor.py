"""What ``k5train doctor`` says of machines that are given as facts, and that it comes to its end on this one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k5cache.shared.tested_versions import TESTED
from k5train.base import architecture
from k5train.cli import app
from k5train.doctor import card, compiler, hub, machine, packages, probe, room, torch_build
from k5train.doctor.check import Check, attempt, environment
from k5train.doctor.compiler import Compiler
from k5train.doctor.hub import Hub
from k5train.doctor.machine import Machine, read_machine
from k5train.doctor.torch_build import Card, Torch

ROOT = Path(__file__).parent.parent
GIB = 2**30
WHEELS = "pip install torch --index-url https://download.pytorch.org/whl/"
ADA = Card("RTX 4070", 12 * GIB, 11 * GIB, (8, 9), has_bf16=True)
TURING = Card("RTX 2070", 8 * GIB, 7 * GIB, (7, 5), has_bf16=False)
BLACKWELL = Card("RTX 5090", 32 * GIB, 31 * GIB, (12, 0), has_bf16=True)
RX_7900 = Card("RX 7900 XTX", 24 * GIB, 23 * GIB, (11, 0), has_bf16=True, arch="gfx1100")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
PC = Machine("Linux", "RTX 4070", "550.54.15")
SEEN = Torch("2.13.0+cu126", "12.6", None, (ADA,), CU126)
BLIND = Torch("2.13.0+cu130", "13.0", None, (), (), "the driver is too old")
FOR_CPUS = Torch("2.13.0+cpu")
ROCM = Torch("2.13.0+rocm7", None, "7.0", (RX_7900,), ("gfx90a", "gfx1100"))
RTX_50 = Machine("Linux", "RTX 5090", "580.65")
RADEON = Machine("Linux", amd="an AMD card")
ALL = Compiler("3.4", "/usr/bin/gcc", has_headers=True)
LINES = ["numpy>=1.26", "pillow>=11.3", "torch>=2.7", 'lion-pytorch>=0.2; extra == "lion"',
         'wandb>=0.19; extra == "wandb"', 'pytest>=8; extra == "test"']  # fmt: skip

MACHINES: list[tuple[str, Check, str, str, tuple[str, ...]]] = [
    # what it is, its check, the mark, words that are in it, the commands
    ("a CPU build beside a card", torch_build.judge_torch(FOR_CPUS, PC), "does not work",
     "cannot use RTX 4070", ("pip uninstall -y torch", WHEELS + "cu126")),
    ("a CPU build, new driver", torch_build.judge_torch(FOR_CPUS, Machine("Windows", "RTX 4070", "581.29")),
     "does not work", "for CPUs", ("pip uninstall -y torch", WHEELS + "cu130")),
    ("a CPU build, no card", torch_build.judge_torch(FOR_CPUS, Machine()), "good", "without a GPU", ()),
    ("a CPU build beside an AMD card", torch_build.judge_torch(FOR_CPUS, RADEON), "does not work", "an AMD card",
     ("pip uninstall -y torch", "# then the command for ROCm from https://pytorch.org/get-started/locally")),
    ("no torch", torch_build.judge_torch(Torch(problem="ModuleNotFoundError: No module named 'torch'"), Machine()),
     "does not work", "torch is not installed", (WHEELS + "cpu",)),
    ("a torch that crashes", torch_build.judge_torch(Torch(problem="it ended with code -11"), PC), "does not work",
     "cannot be imported: it ended with code -11", ("pip uninstall -y torch", WHEELS + "cu126")),
    ("an old torch", torch_build.judge_torch(Torch("2.6.0+cu124", "12.4"), PC), "does not work", "2.7 or newer",
     ("pip uninstall -y torch", WHEELS + "cu126")),
    ("a card newer than the build", torch_build.judge_torch(Torch("2.7", "12.6", None, (BLACKWELL,), CU126), RTX_50),
     "does not work", "no kernels for the RTX 5090, of compute capability 12.0",
     ("pip uninstall -y torch", WHEELS + "cu130")),
    ("a card that runs its generation's code", torch_build.judge_torch(SEEN, PC), "good", "right kind", ()),
    ("ROCm", torch_build.judge_torch(ROCM, RADEON), "look at this", "Nothing was tried on AMD cards",
     ("k5train selftest CACHE",)),
    ("an AMD card that ROCm's torch was not built for",
     torch_build.judge_torch(Torch("2.13.0+rocm7", None, "7.0", (RX_7900,), ("gfx90a",)), RADEON), "does not work",
     "no kernels for the RX 7900 XTX, of gfx1100",
     ("pip uninstall -y torch", "# then the command for ROCm from https://pytorch.org/get-started/locally")),
    ("an AMD card by its architecture", card.judge_gpu(ROCM, RADEON), "good", "23.0 GiB free, gfx1100", ()),
    ("an AMD card that torch does not see", card.judge_gpu(Torch("2.13", None, "7.0", (), (), "no device"), RADEON),
     "does not work", "--device /dev/kfd", ()),
    ("AMD's int8", card.judge_int8(ROCM, {"int8": True, "int_mm": False}), "good", "our kernel runs on them",
     ("--set train.base_model_precision=int8-dynamic",)),
    ("AMD without int8", card.judge_int8(ROCM, {"int8": False, "int_mm": False}), "good", "has no int8 matmul", ()),
    ("AMD's flash attention", card.judge_attention(ROCM, {"flash": True, "cudnn": True}), "good", "uses flash", ()),
    ("AMD without attention", card.judge_attention(ROCM, {"flash": False}), "look at this", "experimental",
     ("export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1",)),
    ("a driver too old", torch_build.judge_driver(BLIND, PC), "does not work", "for CUDA up to 12.4",
     ("pip uninstall -y torch", WHEELS + "cu126")),
    ("a driver far too old", torch_build.judge_driver(SEEN, Machine("Linux", "GTX 1080", "470.82")), "does not work",
     "CUDA up to 11.0",
     ("# update NVIDIA's driver first, then the command for CUDA from https://pytorch.org/get-started/locally",)),
    ("a driver older, of the same CUDA", torch_build.judge_driver(SEEN, PC), "good", "runs too", ()),
    ("a card without a driver", torch_build.judge_driver(BLIND, Machine("Linux", "an NVIDIA card")), "does not work",
     "Install NVIDIA's driver", ("nvidia-smi",)),
    ("no card", torch_build.judge_driver(FOR_CPUS, Machine()), "good", "no NVIDIA driver", ()),
    ("a card in use", card.judge_gpu(Torch("2.13", "12.6", None, (Card("A", 16 * GIB, 9 * GIB, (8, 6), True),)), PC),
     "look at this", "Other programs use 7.0 GiB", ("nvidia-smi",)),
    ("two cards", card.judge_gpu(Torch("2.13", "12.6", None, (ADA, ADA)), PC), "good",
     "1 more can be chosen: CUDA_VISIBLE_DEVICES=1 before the command", ()),
    ("hidden cards", card.judge_gpu(BLIND, Machine("Linux", "RTX", "580", hidden_by="CUDA_VISIBLE_DEVICES='-1'")),
     "does not work", "hidden by CUDA_VISIBLE_DEVICES='-1'", ("unset CUDA_VISIBLE_DEVICES",)),
    ("a card that torch does not see", card.judge_gpu(BLIND, PC), "does not work", "the driver is too old", ()),
    ("a Mac", card.judge_gpu(FOR_CPUS, Machine("Darwin")), "does not work", "Apple's GPUs are not supported", ()),
    ("Turing", card.judge_bf16(Torch("2.13", "12.6", None, (TURING,))), "does not work", "RTX 2070 has no bfloat16",
     ("k5train run CACHE --set train.mixed_precision=fp32",)),
    ("Ada", card.judge_bf16(SEEN), "good", "computes in bfloat16", ()),
    ("Turing's int8", card.judge_int8(Torch("2.13", "12.6", None, (TURING,)), {"int8": True}), "good",
     "The default, auto, is int8-quanto here", ()),
    ("int8 cores", card.judge_int8(SEEN, {"int8": True}), "good", "The default, auto, is int8-dynamic here",
     ("--set train.base_model_precision=int8-quanto",)),
    ("a kernel that fails", card.judge_int8(SEEN, {"int8": False}), "look at this", "does not run", ()),
    ("an answer cut off", card.judge_int8(SEEN, {}), "look at this", "was not tried", ()),
    ("flash", card.judge_attention(SEEN, {"flash": True, "cudnn": True, "efficient": True}), "good",
     "Training uses flash", ()),
    ("cuDNN only", card.judge_attention(SEEN, {"flash": False, "cudnn": True}), "look at this", "cuDNN", ()),
    ("no attention", card.judge_attention(SEEN, {"flash": False, "cudnn": False, "efficient": False}), "look at this",
     "no fused kernel runs", ()),
    ("no compiler", compiler.judge_compiler(Compiler("3.4", "", True), True, "failed"), "look at this",
     "no C compiler", ("sudo apt-get install gcc",)),
    ("no headers", compiler.judge_compiler(Compiler("3.4", "/usr/bin/gcc", False, python="3.11"), True, "failed"),
     "look at this", "no Python headers", ("sudo apt-get install python3.11-dev",)),
    ("Windows without Triton", compiler.judge_compiler(Compiler("", "", False, "Windows"), True, None),
     "look at this", "run eagerly", ("pip install triton-windows",)),
    ("Windows with Triton", compiler.judge_compiler(Compiler("3.4", "", False, "Windows"), True, ""), "good",
     "a small kernel compiles", ()),
    ("a kernel without an answer", compiler.judge_compiler(ALL, True, "no answer within 240 s"), "look at this",
     "no answer within 240 s", ()),
    ("nothing to compile for", compiler.judge_compiler(Compiler("", "", False), False, None), "good", "no Triton", ()),
    ("a full disk", room.judge_disk([room.Volume(("runs", "hub downloads"), 3 * GIB, 30 * GIB)]), "does not work",
     "needs up to 30.0 GiB",
     ("export HF_HOME=/a/larger/disk/huggingface", "export K5_HOME=/a/larger/disk/k5")),
    ("a disk for few images", room.judge_disk([room.Volume(("cache",), 294_000_000, 0)]), "look at this",
     "100 images of a cache", ()),
    ("two disks", room.judge_disk([room.Volume(("runs",), 90 * GIB, 0), room.Volume(("hub",), 50 * GIB, 35 * GIB)]),
     "good", "90.0 GiB free for runs; 50.0 GiB free for hub", ()),
    ("a container", room.judge_ram(2 * GIB, 60 * GIB), "does not work", "the machine has 60.0 GiB", ()),
    ("little RAM", room.judge_ram(6 * GIB, None), "look at this", "6.0 GiB free", ()),
    ("64 descriptors", room.judge_open_files(64), "look at this", "64 files", ("ulimit -n 4096",)),
    ("Windows' descriptors", room.judge_open_files(None), "good", "no limit", ()),
    ("no network", hub.judge_hub(Hub(False, problem="ConnectError: no route")), "does not work", "no route", ()),
    ("no network, nothing to fetch", hub.judge_hub(Hub(True, problem="ConnectError: no route")), "look at this",
     "downloaded copy", ()),
    ("offline", hub.judge_hub(Hub(False, offline="HF_HUB_OFFLINE=1")), "does not work", "HF_HUB_OFFLINE=1 is set",
     ("unset HF_HUB_OFFLINE",)),
    ("a wrong token", hub.judge_hub(Hub(True, has_token=True, status=401, problem="401")), "look at this",
     "refuses the token", ("hf auth login", "hf auth logout")),
    ("a right token", hub.judge_hub(Hub(False, has_token=True)), "good", "a token is set and accepted", ()),
    ("a folder", hub.judge_hub(Hub(True, is_folder=True)), "good", "not asked", ()),
    ("a package that is missing", packages.judge_packages(LINES, {"numpy": "1.20"}), "does not work",
     "pillow is missing; numpy 1.20 is not in the range >=1.26", ('pip install "pillow>=11.3" "numpy>=1.26"',)),
    ("a package that was not tested", packages.judge_packages(LINES, {"numpy": "1.26.4", "pillow": TESTED["pillow"]}),
     "good", f"other versions of numpy 1.26.4 ({TESTED['numpy']})", ()),
    ("an optimizer that is not there", packages.judge_extras(LINES, {"wandb": "0.30"}), "good",
     "Only needed for the optimizer lion:", ('pip install "kandinsky5-lora[lion]"',)),
    ("fonts that are not there", packages.judge_extras(['noto>=1; extra == "fonts"', 'wandb>=1; extra == "wandb"'], {}),
     "good", "the tracker wandb and the letters of Chinese", ('pip install "kandinsky5-lora[fonts,wandb]"',)),
    ("an extra of an extra", packages.judge_extras(['ray[data]<3,>=2.50; extra == "ray"'], {"ray": "2.60.0"}),
     "good", "ray installed", ()),
    ("an engine that is not there", packages.judge_extras(['ray[data]<3,>=2.50; extra == "ray"'], {}),
     "good", "Only needed for the encodes on several GPUs", ('pip install "kandinsky5-lora[ray]"',)),
    ("a tracker that is too old", packages.judge_extras(LINES, {"wandb": "0.1", "lion-pytorch": "0.2"}),
     "look at this", "wandb 0.1 is not in >=0.19", ('pip install "kandinsky5-lora[wandb]"',)),
    ("a check that fails", attempt("disk", lambda: room.judge_disk([])), "look at this",
     "could not be checked: ValueError", ()),
]  # fmt: skip


def test_each_machine_gets_its_mark_its_meaning_and_its_command():
    for what, check, mark, words, commands in MACHINES:
        assert (check.mark, check.commands) == (mark, commands), what
        assert words in f"{check.found} {check.meaning}", (what, check)
    assert environment("HF_HUB_OFFLINE", is_windows=True) == "set HF_HUB_OFFLINE="


def test_the_tested_versions_are_those_of_the_constraints():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert {name: pins.get(name) for name in TESTED} == TESTED
    required = re.findall(r'^  "([\w.-]+)>=', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert set(required) <= set(TESTED)


def test_cards_are_seen_by_the_system_where_torch_sees_none(tmp_path, monkeypatch):
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")

    monkeypatch.setattr(machine, "_from_nvidia_smi", lambda: ("", ""))
    assert (read_machine(tmp_path).nvidia, read_machine(tmp_path).amd) == ("", "")
    write("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    write("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    assert (read_machine(tmp_path).nvidia, read_machine(tmp_path).driver) == ("an NVIDIA card", "")
    write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    write("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA GeForce RTX 4070\nIRQ: 1\n")
    assert read_machine(tmp_path).nvidia == "NVIDIA GeForce RTX 4070"
    assert read_machine(tmp_path).driver == "550.54.15"


def test_a_probe_that_dies_or_never_answers_leaves_what_it_said(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho \'{"version": "2.13"}\'\necho "a library talks"\n[ $4 = hub ] && sleep 60\n'
                    'echo "Illegal instruction" >&2\nexit 132\n')  # fmt: skip
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert probe.ask("torch", seconds=20) == ({"version": "2.13"}, "Illegal instruction")
    assert probe.ask("hub", seconds=0.3) == ({"version": "2.13"}, "no answer within 0.3 s")


def test_the_plan_is_the_planners_for_the_card_or_says_why_there_is_none(monkeypatch):
    small = {**architecture.FULL_SIZE, "num_text_blocks": 1, "num_visual_blocks": 2}  # shapes of the rest take seconds
    monkeypatch.setattr(architecture, "FULL_SIZE", small)
    facts: probe.Facts = {}
    for part in probe._plan("12GB"):
        facts |= part
    assert (facts["budget"], sum(facts["levels"].values())) == (11.25 * GIB, 2)
    check = card.judge_plan({**facts, "peak": 10 * GIB}, "", "12GB")
    assert check.mark == "good"
    assert check.found == "on a card of 12GB, 1024x1024 trains within 10.0 GiB of 11.2 GiB, int8-dynamic"
    check = card.judge_plan(next(probe._plan("1GB")), "", "1GB")
    assert check.mark == "does not work"
    assert re.fullmatch(r"Use a GPU with at least \d\.\d GiB of memory\.", check.meaning)


def test_the_command_comes_to_its_end_here_and_names_every_check(monkeypatch, tmp_path):
    """On this machine, whatever it has; offline, and with a token that must not be printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("K5_HOME", str(tmp_path / "home"))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(done.stdout)
    names = ["versions", "packages", "extras", "RAM", "open files", "K5_HOME", "disk", "hub", "torch", "driver", "GPU"]
    assert [check["name"] for check in report["checks"]] == [*names, "bf16", "compile", "int8", "attention", "plan"]
    assert {check["mark"] for check in report["checks"]} <= {"good", "look at this", "does not work"}
    assert report["works"] is not any(check["mark"] == "does not work" for check in report["checks"])
    assert done.exit_code == (0 if report["works"] else 1)
    assert "secret" not in done.output
    assert "could not be checked" not in done.output
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("vram", ["much", "-1GB", "0"])
def test_an_amount_that_is_none_is_refused(vram):
    assert "is not an amount of memory" in str(CliRunner().invoke(app, ["doctor", "--vram", vram]).exception)
