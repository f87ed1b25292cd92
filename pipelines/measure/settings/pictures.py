"""What do the trial's LoRAs draw? Sheets of what the runs of the first seed drew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from k5train.pictures.sheet import grid
from k5train.runs.folder import Run
from pipelines.measure.settings.concepts import CONCEPTS
from pipelines.measure.settings.grid import CENTRE_RATE, RATES, REGULARISED, SETTINGS, Job, Setting
from pipelines.measure.settings.trial import PROMPTS, Place

_COLOURS = 96  # of the palette: the sheets stand in the docs


def write_sheets(place: Place, out: Path) -> list[Path]:
    """Write ``OUT-rates.png`` and ``OUT-trigger.png`` of the runs that were made in this place; returns them."""
    by_name = {f"{setting.group}={setting.name}": setting for setting in SETTINGS}
    rates = {f"rate {rate}": by_name[f"rate={rate}"] for rate in RATES}
    triggers = {f"trigger alone, rate {rate}": by_name[f"rate={rate}"] for rate in (CENTRE_RATE, "3e-4")}
    triggers |= {f"with regularisation data, rate {rate}": by_name[f"trigger={name}"] for name, rate in REGULARISED}
    sheets = {"rates": (rates, CONCEPTS), "trigger": (triggers, ("creature",))}
    written = []
    for name, (rows, concepts) in sheets.items():
        there = {label: s for label, s in rows.items() if all(_drawn(place, s, concept) for concept in concepts)}
        if there:
            path = out.with_name(f"{out.stem}-{name}.png")
            picture = sheet(place, there, concepts)
            picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            written.append(path)
    return written


def sheet(place: Place, rows: dict[str, Setting], concepts: Sequence[str]) -> Image.Image:
    """The base's row, and one for each setting; a column for each prompt of each concept."""
    first = next(iter(rows.values()))
    pictures = [("base", [p for concept in concepts for p in _drawn(place, first, concept, step=0)])]
    pictures += [
        (label, [p for concept in concepts for p in _drawn(place, setting, concept)]) for label, setting in rows.items()
    ]
    return grid(pictures, [prompt for concept in concepts for prompt in PROMPTS[concept]])


def _drawn(place: Place, setting: Setting, concept: str, step: int | None = None) -> list[Image.Image]:
    """What a run of the first seed drew, at its end or after ``step``; empty if it is not there."""
    folder = Run(place.run(Job(setting, concept, 0))).samples(setting.measured_at[-1] if step is None else step)
    files = [folder / f"{i:02}.png" for i in range(len(PROMPTS[concept]))]
    return [Image.open(file).convert("RGB") for file in files] if all(file.is_file() for file in files) else []
