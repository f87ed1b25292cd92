"""Which learning rate is usual for an adapter and an optimizer? What a recipe without ``train.optim.lr`` trains at."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimizerName
from k5train.options.train import TrainConfig

# The factors are from `python -m pipelines.measure.rates`: at them k5-micro learns as it does with a LoRA and AdamW.
LORA = 1e-4  # the official trainer's, for AdamW
LOKR = 10 * LORA  # two small factors, of which one starts at 0, move a weight less than a LoRA's matrices do
RSLORA = (
    0.7  # times the root of its rank, by which its product is larger: A then moves less. Measured at ranks 8 and 32
)
# Lion moves every weight by all of lr. An update of Muon has a fifth of it (torch's match_rms_adamw), and AdamW's has
# less than all of it, because gradients are noise in part.
OF_ADAMW: dict[OptimizerName, float] = {
    "adamw": 1, "adamw8bit": 1, "schedulefree": 1, "adafactor": 1, "lion": 1 / 3, "muon": 2.5,
}  # fmt: skip
PRODIGY = 1.0  # finds the rate by itself and multiplies it by lr
FAR = 3  # times the usual rate or a third of it: as far as Lion's is from AdamW's


def usual_rate(lora: LoraConfig, optimizer: OptimizerName) -> float:
    """The usual learning rate, in two digits."""
    if optimizer == "prodigy":
        return PRODIGY
    adamw = {"lora": LORA, "dora": LORA, "rslora": LORA / max(1, RSLORA * sqrt(lora.rank)), "lokr": LOKR}[lora.algo]
    return float(f"{adamw * OF_ADAMW[optimizer]:.1e}")


def with_usual_rate(config: TrainConfig) -> TrainConfig:
    """The recipe with a number for ``train.optim.lr``: its own, or the usual one."""
    if config.optim.lr is not None:
        return config
    return replace(config, optim=replace(config.optim, lr=usual_rate(config.lora, config.optim.optimizer)))


def rate_warnings(config: TrainConfig) -> list[str]:
    """What is to be said of a learning rate that belongs to another adapter or optimizer.

    Nothing is said of a LoRA or a DoRA with AdamW, for which any rate may be meant.
    """
    lora, optim = config.lora, with_usual_rate(config).optim
    assert optim.lr is not None
    usual = usual_rate(lora, optim.optimizer)
    advice = f"Leave it out for {usual:g}, which is usual for {lora.algo} with {optim.optimizer}"
    found = f"train.optim.lr is {optim.lr:g}"
    if optim.optimizer == "prodigy":
        is_low = optim.lr < PRODIGY / FAR
        return [f"{found}, and Prodigy multiplies the rate that it finds by it. {advice}"] if is_low else []
    if lora.algo == "rslora":
        scale = (lora.rank if lora.alpha is None else lora.alpha) / sqrt(lora.rank)
        as_lora, of_lora = optim.lr * RSLORA * scale, LORA * OF_ADAMW[optim.optimizer]
        if as_lora < 0.99 * FAR * of_lora:
            return []
        return [
            f"{found}, and this rsLoRA is scaled by {scale:.3g}: it changes the model about as a LoRA does at"
            f" {as_lora:.2g}. Use --set train.optim.lr={of_lora / (RSLORA * scale):.1e}, which is as a LoRA at"
            f" {of_lora:.2g}"
        ]
    if lora.algo == "lokr" and optim.lr < 1.01 * usual / FAR:
        return [f"{found}, at which a LoKr hardly learns. {advice}"]
    if optim.optimizer == "lion" and optim.lr > 0.99 * FAR * usual:
        return [f"{found}, and every weight moves by all of it in every update of Lion. {advice}"]
    if optim.optimizer == "muon" and optim.lr < 1.01 * usual / FAR:
        return [f"{found}, and an update of Muon has a fifth of its size. {advice}"]
    return []
