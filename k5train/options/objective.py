"""The options of what a step asks of the transformer: sigma, loss, TREAD and rollout. Docstrings are their help."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar, Literal

from k5train.options.removed import OBJECTIVE, Removed


@dataclass(frozen=True)
class ObjectiveConfig:
    """``[train.objective]``: which sigmas are trained, how errors are weighed. Defaults are the official trainer's."""

    sigma_sampling: Literal["sigmoid", "uniform", "logit_normal", "mode", "beta"] = "sigmoid"
    """Where sigma is drawn before the shift. ``sigmoid``: sigmoid(sigmoid_scale * N(0, 1)). ``logit_normal``:
    sigmoid(N(logit_mean, logit_std)). ``mode``: SD3's, more in the middle or at the ends by ``mode_scale``. ``beta``:
    Beta(beta_schedule_alpha, beta_schedule_beta). ``uniform``: 0 to 1."""
    sigmoid_scale: float = 1.0
    """Of ``sigmoid``: above 1 trains more at both ends, below 1 more in the middle."""
    logit_mean: float = 0.0
    """Of ``logit_normal``: above 0 trains more on noisy inputs."""
    logit_std: float = 1.0
    """Of ``logit_normal``."""
    mode_scale: float = 1.29
    """Of ``mode``: from -1 (ends) to 1.75 (middle); 0 is uniform. SD3 uses 1.29."""
    beta_schedule_alpha: float = 2.0
    """Of ``beta``: first shape; larger trains more on noisy inputs."""
    beta_schedule_beta: float = 2.0
    """Of ``beta``: second shape; larger trains more on clean inputs."""
    flow_schedule_auto_shift: bool = False
    """Shift by each bucket's number of tokens, by Flux's rule, in place of ``flow_schedule_shift``: 1.88 at 512x512,
    3.16 at 1024x1024."""
    stratified_sigmas: bool = False
    """One sigma from each of n equal slices of the distribution, over the n rows of an update: losses jump less."""
    weighting: Literal["none", "cosmap", "bell", "min_snr"] = "none"
    """How errors are weighed by sigma. ``cosmap``: SD3's 2/(pi*(1 - 2*sigma + 2*sigma^2)). ``bell``: a bell around 0.5
    with mean 1. ``min_snr``: min(SNR, snr_gamma) * sigma^2, Min-SNR's weight carried over to the velocity."""
    snr_gamma: float = 5.0
    """Of ``min_snr``: the largest signal-to-noise ratio that counts."""
    loss_type: Literal["l2", "huber"] = "l2"
    """Mean squared error, or Huber's: squared up to ``huber_c``, linear beyond, so outliers pull less."""
    huber_c: float = 1.0
    """Of ``huber``: the error, in units of the velocity, at which it turns linear."""
    masked_loss: bool = False
    """Average errors over what the cached masks cover; rows without a mask count whole."""
    unmasked_weight: float = 0.0
    """Of ``masked_loss``: the least weight of what a mask leaves out, 0 to 1."""
    prior_loss_weight: float = 1.0
    """Weight of rows from ``[[train.data]]`` entries with ``is_regularisation_data``."""

    removed: ClassVar[Removed] = OBJECTIVE

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
        if not 0 <= self.unmasked_weight <= 1:
            problems.append(f"unmasked_weight must be 0 to 1, found {self.unmasked_weight}")
        if not 0 <= self.prior_loss_weight < inf:
            problems.append(f"prior_loss_weight must be 0 or more, found {self.prior_loss_weight}")
        return problems


@dataclass(frozen=True)
class RouteConfig:
    """``[[train.tread.routes]]``: one stretch of visual blocks that part of the tokens skips."""

    selection_ratio: float
    """Share of the visual tokens that skip the blocks, 0 to below 1."""
    start_layer_idx: int
    """First visual block that they skip; negative counts from the end."""
    end_layer_idx: int
    """Last visual block that they skip; negative counts from the end."""

    def check(self) -> list[str]:
        """What is out of range; the layers are checked against the transformer when training starts."""
        if 0 <= self.selection_ratio < 1:
            return []
        return [f"selection_ratio must be at least 0 and below 1, found {self.selection_ratio}"]


@dataclass(frozen=True)
class TreadConfig:
    """``[train.tread]``: TREAD, part of the visual tokens skip some blocks in training, which is faster."""

    routes: tuple[RouteConfig, ...] = ()
    """``[[train.tread.routes]]`` entries: ``selection_ratio`` is the share of the tokens that skips the visual blocks
    ``start_layer_idx`` to ``end_layer_idx``, inclusive; negative indices count from the end. Usual: 0.5, 2, -2."""
    keep_masked: bool = False
    """Tokens that a cached mask covers never skip."""
    ramp_down: float = 0.0
    """Share of the steps, at the end, over which every ratio falls linearly to 0: the last step sees every token."""

    def check(self) -> list[str]:
        """What is out of range."""
        return [] if 0 <= self.ramp_down <= 1 else [f"ramp_down must be 0 to 1, found {self.ramp_down}"]


@dataclass(frozen=True)
class RolloutConfig:
    """``[train.rollout]``: scheduled sampling, some rows are trained on inputs that the model itself has made."""

    probability: float = 0.0
    """Share of rows whose noisy input comes from the model's own Euler steps. Each costs ``max_steps`` forward passes
    at most; ``metrics.jsonl`` logs passes and seconds."""
    ramp_steps: int = 0
    """Optimizer steps over which the probability rises linearly from 0."""
    max_steps: int = 1
    """Most Euler steps that lead to the input; each row draws 1 to this."""
    num_inference_steps: int = 50
    """Of the inference grid that the steps are taken on; the scheduler's own shift applies."""
    min_sigma: float = 0.1
    """Rows at a lower sigma are trained as usual: the target divides by sigma, and so multiplies errors by 1/sigma."""

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


@dataclass(frozen=True)
class DataConfig:
    """``[[train.data]]``: one of the caches that a run trains on."""

    cache: str
    """Folder made by ``k5cache encode``."""
    weight: float | None = None
    """Share of an epoch's rows that come from this cache, relative to the other entries' weights. None: by its size."""
    repeats: int = 1
    """How often each of its images counts in one epoch."""
    is_regularisation_data: bool = False
    """Images of the class, not the subject: their errors count ``prior_loss_weight`` times."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        if self.weight is not None and not 0 < self.weight < inf:
            problems.append(f"weight must be above 0, found {self.weight}")
        if self.repeats < 1:
            problems.append(f"repeats must be at least 1, found {self.repeats}")
        return problems
