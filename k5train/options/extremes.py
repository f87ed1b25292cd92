"""Which values are allowed, and known to spoil pictures? A warning and no error: somebody may want to see it."""

from __future__ import annotations

from collections.abc import Sequence

from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig

HIGH_GUIDANCE = 7.0
LOW_SHIFT, HIGH_SHIFT = 0.3, 6.0
HIGH_STRENGTH = 1.5


def extreme_values(config: TrainConfig) -> list[str]:
    """One line for each value of a recipe that is far from what is usual."""
    lines = guidance_warnings(config.validation)
    shift = config.flow_schedule_shift
    advice = "Use --set train.flow_schedule_shift=1, or 3 as the official trainer"
    if shift > HIGH_SHIFT:
        lines.append(
            f"train.flow_schedule_shift is {shift:g}: nearly every step trains on very noisy inputs, from which the"
            f" composition is learned and texture is not. {advice}"
        )
    if shift < LOW_SHIFT:
        lines.append(
            f"train.flow_schedule_shift is {shift:g}: nearly every step trains on almost clean inputs, from which"
            f" texture is learned and the composition is not. {advice}"
        )
    return lines


def guidance_warnings(validation: ValidationConfig) -> list[str]:
    """A line if pictures will look burnt because of the guidance, whatever the LoRA."""
    if validation.guidance_scale < HIGH_GUIDANCE:
        return []
    return [
        f"train.validation.guidance_scale is {validation.guidance_scale:g}: from {HIGH_GUIDANCE:g} on pictures tend to"
        " look burnt, with or without the LoRA. Use --set train.validation.guidance_scale=5"
    ]


def strength_warnings(strengths: Sequence[float]) -> list[str]:
    """A line if a LoRA is drawn so strongly that its pictures look burnt."""
    high = sorted({f"{strength:g}" for strength in strengths if strength > HIGH_STRENGTH}, key=float)
    if not high:
        return []
    return [
        f"A strength of {', '.join(high)} changes the model more than training did, and pictures tend to look burnt."
        " If --strength 1 is too weak, train more steps or at a higher rate"
    ]
