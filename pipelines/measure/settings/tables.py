"""What do the trial's results say? Tables in Markdown: what each setting learned and what it made the base forget.

Every number is a share of the base's loss: on pictures of the concept that nothing was trained on (learned: below 1 is
better than the base), and on the base's own styles (forgot: above 1 is worse than the base). With more than one seed it
is the mean, and behind it half the distance between the lowest and the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.measure.settings.concepts import CONCEPTS
from pipelines.measure.settings.grid import ADAPTERS, CENTRE_RATE, LONG, LONGEST_TREAD, RATES, REGULARISED, STEPS

Results = Mapping[str, Any]
"""Of a trial's file: what was measured, by ``group=name/concept/seed``, and of the base by ``base/concept``."""
CENTRE = f"rate={CENTRE_RATE}"
LABELS = {"lines": "line style", "mosaic": "mosaic", "creature": "creature"}


def tables(results: Results) -> str:
    """All tables."""
    return "\n\n".join((rates(results), one_option(results), trigger(results), slower(results))) + "\n"


def rates(results: Results) -> str:
    """Learning rates and numbers of steps."""
    lines = [
        (f"{rate}, {step} steps" if step != "ema" else f"{rate}, {LONG} steps, average", f"rate={rate}", step)
        for rate in RATES
        for step in (str(STEPS // 2), str(STEPS), str(LONG), "ema")
    ]
    return both(results, "rate", lines)


def one_option(results: Results) -> str:
    """Each setting beside the centre, after as many steps."""
    lines = [("the centre", CENTRE, str(STEPS))]
    lines += [(f"rank {rank}", f"rank={rank}", str(STEPS)) for rank in (4, 16, 64)]
    lines += [(f"targets {name}", f"targets={name}", str(STEPS)) for name in ("attention", "qkv")]
    lines += [(f"caption dropout {share}", f"caption dropout={share}", str(STEPS)) for share in (0.0, 0.5)]
    lines += [("shift 3", "shift=3", str(STEPS))]
    lines += [(f"{algo}, rate {rate}", f"adapter={algo}, {rate}", str(STEPS)) for algo, rate in ADAPTERS]
    lines += [
        ("batch 1", "batch=1", str(STEPS)),
        (f"batch 1, {LONG} steps", "batch=1", str(LONG)),
        (f"batch 4, {STEPS // 2} steps", "batch=4", str(STEPS // 2)),
        ("batch 4", "batch=4", str(STEPS)),
        ("rollout 0.2", "rollout=0.2", str(STEPS)),
        ("TREAD 0.5, ramp_down 0.5", "TREAD=0.5 with a ramp", str(STEPS)),
        ("TREAD 0.5", "TREAD=0.5", str(STEPS)),
        (f"TREAD 0.5, {LONGEST_TREAD} steps", "TREAD=0.5", str(LONGEST_TREAD)),
    ]
    return both(results, "setting", lines)


def trigger(results: Results) -> str:
    """The creature with and without regularisation data: with its name in the caption, without it, and known styles."""
    alone = [(f"trigger alone, rate {rate}", f"rate={rate}") for rate in (CENTRE_RATE, "3e-4")]
    regularised = [(f"with regularisation data, rate {rate}", f"trigger={name}") for name, rate in REGULARISED]
    lines = [(*line, str(step)) for line in (*alone, *regularised) for step in (STEPS, LONG)]
    rows = []
    for label, setting, step in lines:
        shares = [spread(found(results, setting, "creature", step, kind)) for kind in ("held_out", "unnamed", "known")]
        if any(shares):
            rows.append([label, step, *shares])
    return markdown(("", "steps", "with the trigger", "without the trigger", "known styles"), rows)


def slower(results: Results) -> str:
    """How long a step takes compared with the centre's: rollout, TREAD and the adapters."""
    rows = []
    for setting in ("rollout=0.2", "TREAD=0.5", "adapter=dora, 1e-4", "adapter=lokr, 2e-3", "batch=1", "batch=4"):
        ratios = [ratio for concept in CONCEPTS for ratio in time_ratios(results, setting, concept)]
        rows.append([setting.replace("=", " "), spread(ratios)])
    return markdown(("setting", "time of a step over the centre's"), rows)


def both(results: Results, head: str, lines: Iterable[tuple[str, str, str]]) -> str:
    """A table with what each of ``lines`` (label, setting, step) learned and forgot of each concept."""
    columns = (head, *(f"{LABELS[concept]}: {what}" for concept in CONCEPTS for what in ("learned", "forgot")))
    rows = []
    for label, setting, step in lines:
        cells = [
            spread(found(results, setting, concept, step, kind))
            for concept in CONCEPTS
            for kind in ("held_out", "known")
        ]
        if any(cells):
            rows.append([label, *cells])
    return markdown(columns, rows)


def found(results: Results, setting: str, concept: str, step: str, kind: str) -> list[float]:
    """A share of the base's loss from each seed that is done."""
    of_base = results.get(f"base/{concept}")
    measured = [run["measured"][step] for run in runs(results, setting, concept).values() if step in run["measured"]]
    if of_base is None or not measured:  # the trial was stopped before
        return []
    base = statistics.mean(of_base["measured"]["0"][kind])
    return [statistics.mean(losses[kind]) / base for losses in measured]


def runs(results: Results, setting: str, concept: str) -> dict[str, Any]:
    """The runs of a setting by their seed."""
    prefix = f"{setting}/{concept}/"
    return {name.removeprefix(prefix): run for name, run in results.items() if name.startswith(prefix)}


def time_ratios(results: Results, setting: str, concept: str) -> list[float]:
    """Seconds of a step over those of the centre with the same seed."""
    centre = runs(results, CENTRE, concept)
    of_setting = runs(results, setting, concept)
    return [run["seconds_per_step"] / centre[s]["seconds_per_step"] for s, run in of_setting.items() if s in centre]


def spread(values: Sequence[float]) -> str:
    """The mean, and half the distance between the lowest and the highest; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.2f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
