"""Can the steps of a run be captured as CUDA graphs, and if not, which option is in the way?"""

from __future__ import annotations

from k5cache.shared.device import is_rocm
from k5train.options.train import TrainConfig

_TEXT_MULTIPLE = 16


def why_no_graph(config: TrainConfig, device_type: str, execution: str) -> str | None:
    """What keeps the steps of a run from being captured, for the end of a sentence; None if nothing does.

    Args:
        device_type: ``cuda`` or ``cpu``.
        execution: how blocks run, from ``how_to_run``.
    """
    is_routed = bool(config.tread.routes)
    reasons = {
        "there is no GPU": device_type != "cuda",
        'train.memory.graph is "off"': config.memory.graph == "off",
        "it is not tried on AMD's GPUs": device_type == "cuda" and is_rocm(),
        f"blocks run {execution} and not compiled": execution != "compiled",
        "a rollout has as many passes as its rows need (train.rollout.probability)": config.rollout.probability > 0,
        "train.objective.preservation_weight adds passes without the adapter": config.objective.preservation_weight > 0,
        "dropout draws its numbers on the GPU (train.lora.dropout)": config.lora.dropout > 0,
        "the number of tokens changes with the step (train.tread.ramp_down)": is_routed and config.tread.ramp_down > 0,
        "the number of tokens depends on masks (train.tread.keep_masked)": is_routed and config.tread.keep_masked,
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def text_width(num_text_tokens: int) -> int:
    """The tokens that a captured step has room for, at least those of the longest caption."""
    return -(-num_text_tokens // _TEXT_MULTIPLE) * _TEXT_MULTIPLE
