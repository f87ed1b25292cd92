"""Which options of a recipe have no effect, given the others? A warning and no error: a sweep may need them."""

from __future__ import annotations

from operator import attrgetter

from k5train.options.train import TrainConfig

# Option -> the option that it belongs to, and the values of that option with which it has an effect.
BELONGS_TO: dict[str, tuple[str, tuple[str, ...]]] = {
    "objective.sigmoid_scale": ("objective.sigma_sampling", ("sigmoid",)),
    "objective.logit_mean": ("objective.sigma_sampling", ("logit_normal",)),
    "objective.logit_std": ("objective.sigma_sampling", ("logit_normal",)),
    "objective.mode_scale": ("objective.sigma_sampling", ("mode",)),
    "objective.beta_schedule_alpha": ("objective.sigma_sampling", ("beta",)),
    "objective.beta_schedule_beta": ("objective.sigma_sampling", ("beta",)),
    "objective.snr_gamma": ("objective.weighting", ("min_snr",)),
    "objective.huber_c": ("objective.loss_type", ("huber",)),
    "optim.lr_num_cycles": ("optim.lr_scheduler", ("cosine_with_restarts",)),
    "optim.lr_power": ("optim.lr_scheduler", ("polynomial",)),
    "optim.lr_end": ("optim.lr_scheduler", ("linear", "polynomial", "cosine", "cosine_with_restarts", "rex")),
    "lora.decompose_factor": ("lora.algo", ("lokr",)),
    "optim.betas": ("optim.optimizer", ("adamw", "adamw8bit", "lion", "muon", "prodigy", "schedulefree")),
    "optim.eps": ("optim.optimizer", ("adamw", "adamw8bit", "prodigy", "schedulefree")),
}
# Option -> the option without which it has no effect.
NEEDS = {
    "objective.unmasked_weight": "objective.masked_loss",
    "tread.keep_masked": "tread.routes",
    "tread.ramp_down": "tread.routes",
    "rollout.ramp_steps": "rollout.probability",
    "rollout.max_steps": "rollout.probability",
    "rollout.num_inference_steps": "rollout.probability",
    "rollout.min_sigma": "rollout.probability",
    "validation.held_out_every": "validation.split",
    "memory.group_offload_blocks_per_group": "memory.enable_group_offload",
    "memory.group_offload_use_stream": "memory.enable_group_offload",
    "trackers.project": "trackers.use",
    "trackers.offline": "trackers.use",
}


def options_without_effect(config: TrainConfig) -> list[str]:
    """One line for each option that is not at its default and has no effect."""
    default = TrainConfig()
    lines = [
        f"train.{name} does nothing here: it belongs to train.{other} = {' or '.join(values)}"
        for name, (other, values) in BELONGS_TO.items()
        if attrgetter(name)(config) != attrgetter(name)(default) and attrgetter(other)(config) not in values
    ]
    lines += [
        f"train.{name} does nothing here: train.{other} is not set"
        for name, other in NEEDS.items()
        if attrgetter(name)(config) != attrgetter(name)(default) and not attrgetter(other)(config)
    ]
    if config.epochs is not None and config.steps != default.steps:
        lines.append("train.steps does nothing here: train.epochs says when to stop")
    for name in ("repeats", "repeats_by_folder"):
        if config.data and getattr(config, name) != getattr(default, name):
            lines.append(f"train.{name} does nothing here: each [[train.data]] entry has its own")
    if config.epochs is None:
        lines += never_reached(config, config.steps)
    if config.rollout.probability and config.objective.sigma_max < config.rollout.min_sigma:
        lines.append(
            "train.rollout.probability does nothing here: train.objective.sigma_max is below train.rollout.min_sigma"
        )
    has_prior = any(entry.is_regularisation_data for entry in config.data)
    if config.objective.prior_loss_weight != 1 and not has_prior:
        lines.append(
            "train.objective.prior_loss_weight does nothing here: no [[train.data]] entry has is_regularisation_data"
        )
    return lines


def never_reached(config: TrainConfig, num_steps: int) -> list[str]:
    """One line for each option whose value the run rises to and never has."""
    rises = (
        ("optim.lr", "the warm-up", "optim.warmup_steps", config.optim.warmup_steps, True),
        (
            "rollout.probability",
            "its ramp",
            "rollout.ramp_steps",
            config.rollout.ramp_steps,
            config.rollout.probability,
        ),
    )
    return [
        f"train.{name} is never reached: {rise} takes {count} steps and the run {num_steps}. "
        f"Use --set train.{option}={num_steps // 10}"
        for name, rise, option, count, is_used in rises
        if is_used and count >= num_steps > 0
    ]
