"""What can the GPU do: bfloat16, int8, attention, and which plan does it get? Judged from facts, as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k5cache.shared.console import human_bytes
from k5cache.shared.gpus import AMD, NVIDIA
from k5cache.shared.units import count_of
from k5train.doctor.check import Check, environment
from k5train.doctor.machine import Machine
from k5train.doctor.torch_build import Torch

_MUCH_IN_USE = 2 * 2**30  # a desktop takes less
_EXPERIMENTAL = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
_PRECISION = "--set train.base_model_precision="


def judge_gpu(torch: Torch, machine: Machine) -> Check:
    """Whether torch sees a GPU, and how much of its memory is free."""
    if not torch.cards:
        return _no_gpu(torch, machine)
    card, *others = torch.cards
    found = f"{card.name}, {human_bytes(card.total)} of VRAM, {human_bytes(card.free)} free, {card.kind}"
    if card.total - card.free > _MUCH_IN_USE:
        meaning = f"Other programs use {human_bytes(card.total - card.free)}. A run is planned for what is free."
        return Check("GPU", "look at this", found, meaning, () if torch.hip else ("nvidia-smi",))
    variable = AMD if torch.hip else NVIDIA
    more = f"Training uses this one; {len(others)} more can be chosen: {variable}=1 before the command, and so on."
    return Check("GPU", "good", found, more if others else "Training uses it.")


def _no_gpu(torch: Torch, machine: Machine) -> Check:
    """Why there is none. A card that torch's build or the driver keeps from being seen is named there."""
    card = machine.nvidia or machine.amd
    if machine.hidden_by and not torch.is_for_cpus:
        return Check(
            "GPU", "does not work", f"{card or 'every GPU'} is hidden by {machine.hidden_by}",
            "Remove this variable from the environment.",
            (environment(machine.hidden_by.partition("=")[0]),),
        )  # fmt: skip
    if card:
        why = f": {torch.problem}" if torch.problem and torch.version else ""
        gives = "--gpus all" if machine.nvidia else "--device /dev/kfd --device /dev/dri"
        mends = f"torch and driver above say what to mend; in a container, give it the GPU (docker run {gives})."
        return Check("GPU", "does not work", f"{card}, which torch does not see{why}", f"The lines on {mends}")
    apple = " Apple's GPUs are not supported." if machine.system == "Darwin" else ""
    meaning = (
        f"The published model trains on an NVIDIA card of 8 GB or more.{apple} This machine can train small models "
        "on its CPU, such as the demo's."
    )
    return Check("GPU", "does not work", "no GPU", meaning)


def judge_bf16(torch: Torch) -> Check:
    """Whether the card computes in bfloat16, the default."""
    if not torch.cards:
        return Check("bf16", "good", "no GPU to ask", "A CPU computes in bfloat16, slowly.")
    card = torch.cards[0]
    if card.has_bf16:
        return Check("bf16", "good", f"{card.name} computes in bfloat16", "The default precision works.")
    return Check(
        "bf16", "does not work", f"{card.name} has no bfloat16",
        "A GPU of the RTX 30 series or newer has it. float32 works, slowly and in twice the memory.",
        ("k5train run CACHE --set train.mixed_precision=fp32",),
    )  # fmt: skip


def judge_int8(torch: Torch, facts: Mapping[str, Any]) -> Check:
    """Which of the two int8 precisions ``auto``, the default, trains on."""
    default = "The default, auto, is int8-quanto here, which holds int8 weights and multiplies in bf16."
    if not torch.cards:
        return Check("int8", "good", "no GPU to ask", default)
    card = torch.cards[0]
    if card.capability < (8, 0) and not torch.hip:
        return Check("int8", "good", f"{card.name} has no int8 tensor cores that are used here", default)
    if "int8" not in facts:
        return Check("int8", "look at this", "the int8 kernel was not tried", default)
    if not facts["int8"] and not facts.get("int_mm", True):
        return Check("int8", "good", f"{card.name} has no int8 matmul that is used here", default)
    if not facts["int8"]:
        slow = "int8-dynamic would use a slower matmul of torch's."
        return Check("int8", "look at this", "the kernel for int8 tensor cores does not run", f"{slow} {default}")
    found = "int8 tensor cores, and our kernel runs on them"
    if torch.hip:  # as forward/precision.py chooses
        return Check("int8", "good", found, f"{default} To multiply on them:", (f"{_PRECISION}int8-dynamic",))
    meaning = "The default, auto, is int8-dynamic here and multiplies on them. To multiply the same weights in bf16:"
    return Check("int8", "good", found, meaning, (f"{_PRECISION}int8-quanto",))


def judge_attention(torch: Torch, facts: Mapping[str, Any]) -> Check:
    """Which of torch's attention kernels run on the card."""
    if not torch.cards:
        return Check("attention", "good", "no GPU to ask", "A CPU has a kernel of its own.")
    names = {"flash": "flash", "cudnn": "cuDNN", "efficient": "memory-efficient"}
    if not facts.keys() & names.keys():
        return Check("attention", "look at this", "the kernels were not tried")
    working = [name for key, name in names.items() if facts.get(key)]
    found = f"{', '.join(working)}" if working else "no fused kernel runs"
    # As forward/execute.py chooses.
    knows_cudnn = not torch.hip and torch.cards[0].capability[0] in (9, 10)
    best = "cuDNN's" if facts.get("cudnn") and knows_cudnn else ""
    best = best or ("flash" if facts.get("flash") else "")
    if best:
        return Check("attention", "good", found, f"Training uses {best}.")
    if torch.hip:
        meaning = "Attention is slower. For some AMD cards torch has kernels that it calls experimental:"
        return Check("attention", "look at this", found, meaning, (environment(_EXPERIMENTAL, "1"),))
    slower = "Attention is slower" + ("." if working else ", and needs more memory than the plan says.")
    return Check("attention", "look at this", found, f"{slower} A newer torch may have a kernel for this card.")


def judge_plan(facts: Mapping[str, Any], problem: str, vram: str | None) -> Check:
    """Whether the published model trains at 1024x1024, and what it keeps of each block."""
    card = f"a card of {vram}" if vram else "this card"
    if not facts:
        return Check("plan", "look at this", f"could not be checked: {problem}")
    if facts.get("problem"):
        return Check("plan", "does not work", f"1024x1024 on {card}: {facts['problem']}", f"{facts['fix']}.")
    found = (
        f"on {card}, 1024x1024 trains within {human_bytes(facts['peak'])} of {human_bytes(facts['budget'])}, "
        f"{facts['precision']}"
    )
    parts = [f"{count_of(count, 'block keeps', 'blocks keep')} {name}" for name, count in facts["levels"].items()]
    if facts["streamed"]:
        parts.append(f"the weights of {facts['streamed']} are streamed from {human_bytes(facts['host_bytes'])} of RAM")
    option = f" --vram {vram}" if vram else ""
    return Check("plan", "good", found, f"{', '.join(parts)}. All of it:", (f"k5train plan{option}",))
