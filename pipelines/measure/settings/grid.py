"""Which settings are compared? One setting in the centre, and others that differ from it in one option each.

The centre is what the trainer does by default, with a batch of 2, a short warm-up and 400 steps, as a run on 24
pictures at 128 pixels needs no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.shared.recipe import parse
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from pipelines.measure.settings.concepts import CONCEPTS

STEPS = 400
LONG = 2 * STEPS
CENTRE: dict[str, object] = {
    "steps": STEPS,
    "batch_size": 2,
    "unequal_captions": "mask",  # one forward pass for each batch
    "mixed_precision": "fp32",  # bfloat16 is slow on a CPU
    "device": "cpu",
    "memory": {"activations": "all"},  # a model this small need not compute anything twice
    "optim": {"lr": 1e-4, "warmup_steps": 20},
}
RATES = ("3e-5", "1e-4", "3e-4", "1e-3")
CENTRE_RATE = "1e-4"
ADAPTERS = (("rslora", "1.8e-5"), ("rslora", "1e-4"), ("dora", "1e-4"), ("lokr", "2e-3"), ("lokr", "1e-4"))
"""Each adapter at its usual rate, and at that of a LoRA."""
REGULARISED = (("with regularisation data", "1e-4"), ("with regularisation data, 3e-4", "3e-4"))
LONGEST_TREAD = 560  # 40 % more than the centre: longer than any time that TREAD could save
_HALF_OF_THE_TOKENS = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}


@dataclass(frozen=True)
class Setting:
    """One recipe, trained on every concept with every seed."""

    group: str
    """What is compared."""
    name: str
    changes: dict[str, object]
    """Options of ``[train]`` that differ from ``CENTRE``."""
    measured_at: tuple[int, ...] = (STEPS,)
    """Steps after which the adapter is measured. The last one is the length of the run."""
    concepts: tuple[str, ...] = CONCEPTS
    with_class: bool = False
    """Whether every other row is of the class, with its own captions: regularisation data."""
    is_drawn: bool = False
    """Whether the run of the first seed draws pictures."""


@dataclass(frozen=True)
class Job:
    """One run."""

    setting: Setting
    concept: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.setting.group}={self.setting.name}/{self.concept}/{self.seed}"


SETTINGS = (
    *(
        Setting(
            "rate",
            rate,
            {"optim": {"lr": float(rate), "ema_decay": 0.99}},
            measured_at=(STEPS // 2, STEPS, LONG),
            is_drawn=True,
        )
        for rate in RATES
    ),
    *(
        Setting(
            "trigger",
            name,
            {"optim": {"lr": float(rate)}},
            measured_at=(STEPS, LONG),
            concepts=("creature",),
            with_class=True,
            is_drawn=True,
        )
        for name, rate in REGULARISED
    ),
    *(Setting("rank", str(rank), {"lora": {"rank": rank}}) for rank in (4, 16, 64)),
    *(Setting("targets", name, {"lora": {"targets": [name]}}) for name in ("attention", "qkv")),
    *(Setting("caption dropout", str(share), {"caption_dropout_probability": share}) for share in (0.0, 0.5)),
    Setting("shift", "3", {"flow_schedule_shift": 3.0}),
    *(
        Setting("adapter", f"{algo}, {rate}", {"lora": {"algo": algo}, "optim": {"lr": float(rate)}})
        for algo, rate in ADAPTERS
    ),
    Setting("rollout", "0.2", {"rollout": {"probability": 0.2, "max_steps": 2}}),
    Setting(
        "TREAD",
        "0.5",
        {"tread": {"routes": [_HALF_OF_THE_TOKENS]}},
        measured_at=tuple(range(STEPS, LONGEST_TREAD + 1, 40)),
    ),
    Setting("TREAD", "0.5 with a ramp", {"tread": {"routes": [_HALF_OF_THE_TOKENS], "ramp_down": 0.5}}),
    Setting("batch", "1", {"batch_size": 1}, measured_at=(STEPS, LONG)),
    Setting("batch", "4", {"batch_size": 4}, measured_at=(STEPS // 2, STEPS)),
)


def jobs(seeds: int, settings: Sequence[Setting] = SETTINGS) -> Iterator[Job]:
    """All runs: every setting with the first seed, the longest ones first, then with the next seed."""
    for seed in range(seeds):
        for setting in sorted(settings, key=cost, reverse=True):
            yield from (Job(setting, concept, seed) for concept in setting.concepts)


def cost(setting: Setting) -> float:
    """About how long a run takes, in steps of the centre (measured on one core)."""
    batch = setting.changes.get("batch_size", CENTRE["batch_size"])
    assert isinstance(batch, int)
    slower = {"dora": 1.6, "lokr": 1.3}.get(setting.name.partition(",")[0], 1.2 if "rollout" in setting.changes else 1)
    return setting.measured_at[-1] * (0.5 + batch / 4) * slower


def shortened(setting: Setting, factor: float) -> Setting:
    """The same setting for fewer steps: to see that the trial runs."""
    return replace(setting, measured_at=tuple(max(1, round(step * factor)) for step in setting.measured_at))


def recipe(job: Job, trained: Path, of_class: Path, prompts: Sequence[str]) -> TrainConfig:
    """``[train]`` of a run.

    Args:
        trained: the concept's cache.
        of_class: the cache of other things in known styles.
        prompts: what is drawn at the end, if the setting is drawn.
    """
    setting = job.setting
    data = [DataConfig(str(trained), weight=1.0), DataConfig(str(of_class), weight=1.0, is_regularisation_data=True)]
    last = setting.measured_at[-1]
    table = merged(CENTRE, setting.changes) | {
        "name": f"seed-{job.seed}",
        "seed": job.seed,
        "steps": last,
        "checkpoint_every": divisor(setting.measured_at),
    }
    drawn = prompts if setting.is_drawn and job.seed == 0 else ()
    table["validation"] = {
        "prompts": list(drawn), "every": last, "num_inference_steps": 16, "seed": 7, "width": 128, "height": 128,
    }  # fmt: skip
    (config,) = parse({"train": table}, {"train": TrainConfig})
    assert isinstance(config, TrainConfig)
    return replace(config, data=tuple(data)) if setting.with_class else config


def merged(table: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    """A table with changes in it; tables in tables are merged too."""
    both = dict(table)
    for key, value in changes.items():
        before = both.get(key)
        both[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def divisor(steps: Sequence[int]) -> int:
    """The largest number of steps between checkpoints that meets all of ``steps``."""
    from math import gcd

    return gcd(*steps)
