"""What do the packaged recipes need? Steps of the full-size transformer within each recipe's card, and predictions.

Recipes that differ only in what costs neither memory nor time are measured once. ``--predict`` needs no GPU; it writes
the planner's numbers into k5train/recipes/needs.json. ``--take FILE`` puts measured numbers beside them, and both write
the recipes anew.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.console import human_bytes, parse_bytes
from k5cache.shared.kind import Kind, kind_of_flavour
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse
from k5cache.shared.vram import for_torch
from k5train.base.architecture import FULL_SIZE, full_size
from k5train.bench.case import Case, Measured
from k5train.bench.steps import measure_or_warn, time_recipe
from k5train.commands.bench import gpu_to_measure
from k5train.forward.precision import decided
from k5train.options.precision import precision_of
from k5train.options.train import TrainConfig
from k5train.planning.memory import Plan
from k5train.planning.plan import plan_for
from k5train.recipes import needs
from k5train.recipes.listed import PACKAGED
from k5train.recipes.write import write_all
from pipelines.measure import command_line

ROOT = Path(__file__).parent.parent.parent
NEEDS = ROOT / "k5train" / "recipes" / "needs.json"
COLUMNS = ("work", "ms/step", "GPU busy", "reserved GiB", "predicted", "blocks")


@dataclass(frozen=True)
class Work:
    """What several recipes have in common: they need the same memory and the same time a step."""

    name: str
    recipes: tuple[str, ...]
    config: TrainConfig
    kind: Kind
    resolution: int

    @property
    def case(self) -> Case:
        """The same as the bench has it."""
        config, card = self.config, self.config.memory.vram
        assert card is not None
        return Case(
            precision_of(decided(config, is_imagined=True)),
            for_torch(parse_bytes(card)) / 2**30,
            self.resolution,
            config.batch_size,
            needs.TEXT_TOKENS[self.kind],
            config.lora.rank,
            config.lora.targets,
            is_i2i=self.kind == "i2i",
        )


def works() -> list[Work]:
    """One for each kind of work that a packaged recipe is."""
    names: dict[str, list[str]] = {}
    for name, recipe in PACKAGED.items():
        names.setdefault(needs.kind_of_work(recipe.values), []).append(name)
    return [_work(work, tuple(recipes)) for work, recipes in names.items()]


def _work(name: str, recipes: tuple[str, ...]) -> Work:
    model, cache_config, train = parse(
        tomllib.loads(PACKAGED[recipes[0]].text), {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    )
    return Work(name, recipes, train, kind_of_flavour(model) or "t2i", cache_config.resolution)


def predict(work: Work) -> dict[str, Any]:
    """What ``k5train plan`` says of a work, as a recipe writes it."""
    case = work.case
    assert case.cap_gib is not None
    budget = round(case.cap_gib * 2**30)
    sizes = ((case.side // 16) ** 2, case.num_text_tokens)
    plan = plan_for(full_size(work.kind), decided(work.config, is_imagined=True), torch.device("cuda"), sizes, budget)
    return {"predicted": human_bytes(plan.peak), "blocks": blocks_of(plan)}


_LEVELS = {
    "nothing": "recompute everything",
    "attention": "keep only attention",
    "selective": "keep most of attention",
    "matmuls": "keep all matmuls",
    "all": "keep everything",
}


def blocks_of(plan: Plan) -> str:
    """``29 of 50 blocks keep most of attention, 21 keep only attention``."""
    total = len(plan.levels)
    counts = {level: plan.levels.count(level) for level in dict.fromkeys(plan.levels)}
    parts = [f"{count} {_LEVELS[level]}" for level, count in counts.items()]
    subject = f"all {total} blocks" if len(parts) == 1 else f"{plan.levels.count(plan.levels[0])} of {total} blocks"
    parts[0] = f"{subject} {_LEVELS[plan.levels[0]]}"
    if plan.streaming:
        parts.append(
            f"the weights of {plan.streaming.num_blocks} wait in {human_bytes(plan.host_bytes)} of host memory"
        )
    return ", ".join(parts)


def measure(
    wanted: list[Work], device: torch.device, seconds: float, config: dict[str, Any] = FULL_SIZE, num_steps: int = 3
) -> Iterator[tuple[Work, Measured]]:
    """Time steps of each work, until the time is used up. A work that fails is named and left out."""
    begin = time.monotonic()
    for number, work in enumerate(wanted):
        if time.monotonic() - begin > seconds:
            console.warn(f"{seconds:.0f} s are over; not measured: {', '.join(w.name for w in wanted[number:])}")
            return
        case, train = work.case, decided(work.config)
        measured = measure_or_warn(work.name, partial(time_recipe, train, case, device, config, num_steps, 1))
        if measured:
            yield work, measured


def as_needs(measured: Measured, card: str) -> dict[str, Any]:
    """What a recipe says of a measurement."""
    return {
        "card": card,
        "torch": torch.__version__,
        "reserved": f"{measured.reserved_gib:.1f} GiB" if measured.reserved_gib else None,
        "milliseconds": round(measured.milliseconds),
        "busy": round(measured.busy) if measured.busy else None,
    }


def merged(known: Mapping[str, Any], predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of every work: what is new replaces what was, and a work that no recipe is any more goes."""
    return {
        work: {**(known.get(work, {})), **predicted[work], **({"measured": measured[work]} if work in measured else {})}
        for work in predicted
    }


def main(
    out: command_line.Out = None,
    is_predicted: Annotated[bool, typer.Option("--predict", help="Write predictions; needs no GPU.")] = False,
    take: Annotated[Path | None, typer.Option("--take", help="Write the numbers of this JSON; needs no GPU.")] = None,
    seconds: Annotated[float, typer.Option(help="Begin no further measurement after this time.")] = 240,
    only: Annotated[str, typer.Option(help="Measure only works with this in their name.")] = "",
) -> None:
    """Measure what every packaged recipe needs, on a GPU, within the memory of its card."""
    if is_predicted or take:
        numbers = json.loads(take.read_text(encoding="utf-8")) if take else {}
        known = json.loads(NEEDS.read_text(encoding="utf-8"))
        document = merged(known, {work.name: predict(work) for work in works()}, numbers)
        NEEDS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        needs.known.cache_clear()
        write_all(ROOT / "pipelines")
        return
    device = gpu_to_measure(out)
    rows, numbers = [], {}
    for work, measured in measure([work for work in works() if only in work.name], device, seconds):
        numbers[work.name] = as_needs(measured, torch.cuda.get_device_name())
        command_line.write_json(out, numbers)  # after each: what was measured is kept whatever happens next
        rows.append(
            [work.name, f"{measured.milliseconds:.0f}", f"{measured.busy or 0:.0f}",
             f"{measured.reserved_gib or 0:.2f}", f"{measured.predicted_gib or 0:.2f}", measured.plan]
        )  # fmt: skip
    command_line.print_table("full size, random weights", COLUMNS, rows, numbers=COLUMNS[1:5])


if __name__ == "__main__":
    command_line.run(main)
