"""``[train.objective]``, ``[train.tread]`` and ``[train.rollout]``: the options of what a step is trained towards.

The docstring under an option is its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """``[train.objective]``: sigmas and the loss. The defaults are the official trainer's."""

    sigma_sampling: Literal["sigmoid", "uniform", "logit_normal", "mode", "beta"] = "sigmoid"
    """The distribution of sigma before the shift. ``sigmoid``: sigmoid(sigmoid_scale * N(0, 1)). ``logit_normal``:
    sigmoid(N(logit_mean, logit_std)). ``mode``: SD3's, denser in the middle or at the ends, see ``mode_scale``.
    ``beta``: Beta(beta_schedule_alpha, beta_schedule_beta). ``uniform``: 0 to 1."""
    sigmoid_scale: float = 1.0
    """For ``sigmoid``: above 1 trains more at both ends, below 1 more in the middle."""
    logit_mean: float = 0.0
    """For ``logit_normal``, the mean: above 0 trains more on noisy inputs."""
    logit_std: float = 1.0
    """For ``logit_normal``, the standard deviation."""
    mode_scale: float = 1.29
    """For ``mode``: from -1 (denser at the ends) to 1.75 (in the middle); 0 is uniform. SD3 uses 1.29."""
    beta_schedule_alpha: float = 2.0
    """For ``beta``, the first shape: a larger one trains more on noisy inputs."""
    beta_schedule_beta: float = 2.0
    """For ``beta``, the second shape: a larger one trains more on clean inputs."""
    sigma_min: float = 0.0
    """The lowest sigma that is drawn, after the shift. What is left of the distribution keeps its shape. From 0.5 on a
    LoRA learns composition and colours, and hardly texture."""
    sigma_max: float = 1.0
    """The highest sigma that is drawn, after the shift. Up to 0.5 a LoRA learns texture and details, and hardly
    composition."""
    flow_schedule_auto_shift: bool = False
    """Derive the shift from the number of tokens of each bucket, by Flux's rule, instead of ``flow_schedule_shift``:
    1.88 at 512x512, 3.16 at 1024x1024."""
    stratified_sigmas: bool = False
    """Draw the n sigmas of an update from n equal slices of the distribution, one from each: the loss varies less."""
    weighting: Literal["none", "cosmap", "bell", "min_snr"] = "none"
    """How an error is weighted by its sigma. ``cosmap``: SD3's 2/(pi*(1 - 2*sigma + 2*sigma^2)). ``bell``: a bell
    around 0.5 with mean 1. ``min_snr``: min(SNR, snr_gamma) * sigma^2, which is Min-SNR's weight for the velocity."""
    snr_gamma: float = 5.0
    """For ``min_snr``: signal-to-noise ratios above this count as this."""
    loss_type: Literal["l2", "huber"] = "l2"
    """Mean squared error, or Huber's: squared up to ``huber_c`` and linear above it, so outliers count less."""
    huber_c: float = 1.0
    """For ``huber``: the error, in units of the velocity, from which the loss is linear."""
    masked_loss: bool = False
    """Average errors over the area that the cached masks cover. Rows without a mask count in full."""
    unmasked_weight: float = 0.0
    """For ``masked_loss``: the lowest weight that a mask may give to an area, 0 to 1."""
    preservation_weight: float = 0.0
    """Weight of differential output preservation (DOP), usually 1; 0 is without. On each row's class caption, which
    ``cache.class_word`` encodes, the model with the LoRA must predict what it predicts without: so ``sks woman`` is
    learned and ``woman`` stays as it was. A step then takes more than twice as long."""
    prior_loss_weight: float = 1.0
    """Weight of the rows from ``[[train.data]]`` entries with ``is_regularisation_data``."""

    def check(self) -> list[str]:
        """What is out of range."""
        positive = ("sigmoid_scale", "logit_std", "beta_schedule_alpha", "beta_schedule_beta", "snr_gamma", "huber_c")
        problems = [
            f"{name} must be above 0, found {value}"
            for name, value in ((name, getattr(self, name)) for name in positive)
            if not 0 < value < inf
        ]
        if not isfinite(self.logit_mean):
            problems.append(f"logit_mean must be a number, found {self.logit_mean}")
        if not -1 <= self.mode_scale <= 1.75:  # beyond, sigma no longer falls with u (SD3, section 3.1)
            problems.append(f"mode_scale must be -1 to 1.75, found {self.mode_scale}")
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            problems.append(
                f"sigma_min and sigma_max must be 0 to 1, the first below the second, found {self.sigma_min} and"
                f" {self.sigma_max}"
            )
        if not 0 <= self.unmasked_weight <= 1:
            problems.append(f"unmasked_weight must be 0 to 1, found {self.unmasked_weight}")
        if not 0 <= self.preservation_weight < inf:
            problems.append(f"preservation_weight must be 0 or more, found {self.preservation_weight}")
        if not 0 <= self.prior_loss_weight < inf:
            problems.append(f"prior_loss_weight must be 0 or more, found {self.prior_loss_weight}")
        return problems


@dataclass(frozen=True)
class RouteConfig:
    """``[[train.tread.routes]]``: consecutive visual blocks that part of the tokens skips."""

    selection_ratio: float
    """Share of the visual tokens that skip the blocks: at least 0, below 1."""
    start_layer_idx: int
    """First visual block that they skip. Negative numbers count from the end."""
    end_layer_idx: int
    """Last visual block that they skip. Negative numbers count from the end."""

    def check(self) -> list[str]:
        """What is out of range. The layers are checked when training starts, as they depend on the transformer."""
        if 0 <= self.selection_ratio < 1:
            return []
        return [f"selection_ratio must be at least 0 and below 1, found {self.selection_ratio}"]


@dataclass(frozen=True)
class TreadConfig:
    """``[train.tread]``: TREAD. In training, part of the visual tokens skips some blocks, which is faster."""

    routes: tuple[RouteConfig, ...] = ()
    """``[[train.tread.routes]]`` entries: ``selection_ratio`` is the share of the tokens that skips the visual blocks
    from ``start_layer_idx`` to ``end_layer_idx``, both included. Negative indices count from the end. Usual values are
    0.5, 2 and -2."""
    keep_masked: bool = False
    """Tokens that a cached mask covers never skip a block."""
    ramp_down: float = 0.0
    """Share of the steps, at the end of the run, over which every ratio falls linearly to 0: the last step uses all
    tokens."""

    def check(self) -> list[str]:
        """What is out of range."""
        return [] if 0 <= self.ramp_down <= 1 else [f"ramp_down must be 0 to 1, found {self.ramp_down}"]


@dataclass(frozen=True)
class RolloutConfig:
    """``[train.rollout]``: scheduled sampling. Some rows are trained on noisy inputs that the model itself computed."""

    probability: float = 0.0
    """Share of the rows whose noisy input comes from the model's own Euler steps. Each row costs at most ``max_steps``
    forward passes; ``metrics.jsonl`` has the passes and the seconds."""
    ramp_steps: int = 0
    """Optimizer steps over which the probability rises linearly from 0."""
    max_steps: int = 1
    """Largest number of Euler steps that lead to an input; each row draws a number from 1 to this."""
    num_inference_steps: int = 50
    """Steps of the inference schedule whose sigmas are used, with the scheduler's own shift."""
    min_sigma: float = 0.1
    """Rows with a lower sigma are trained as usual, because the target divides by sigma and so multiplies
    errors by 1 / sigma."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        if not 0 <= self.probability <= 1:
            problems.append(f"probability must be 0 to 1, found {self.probability}")
        if self.ramp_steps < 0:
            problems.append(f"ramp_steps must be 0 or more, found {self.ramp_steps}")
        if not 1 <= self.max_steps < self.num_inference_steps:
            problems.append(
                f"max_steps must be at least 1 and below num_inference_steps ({self.num_inference_steps}),"
                f" found {self.max_steps}"
            )
        if not 0 < self.min_sigma < 1:
            problems.append(f"min_sigma must be above 0 and below 1, found {self.min_sigma}")
        return problems
