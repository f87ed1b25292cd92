"""What is there to see of one run? State, curves, pictures, settings and files as values, for the page and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from k5cache.shared.command_line import command
from k5cache.shared.errors import K5Error
from k5cache.shared.inside import is_inside
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import to_dict
from k5cache.shared.units import count_of, human_seconds
from k5cache.shared.urls import with_urls
from k5train.options.extremes import extreme_values
from k5train.options.rate import rate_warnings
from k5train.options.train import TrainConfig
from k5train.options.without_effect import options_without_effect
from k5train.pictures.compared import compare_pictures, shared_steps
from k5train.runs.compared import remarks, shown_value
from k5train.runs.folder import Run, open_run
from k5train.runs.panels import COLOURS, GREY, PALE_GREY, Level, Line, Panel, Row
from k5train.runs.recipe import read_facts
from k5train.runs.record import Record, flat, read_record
from k5train.ui.jobs.job import Job
from k5train.ui.runs.compare_view import PictureStep, step_pictures
from k5train.ui.runs.metrics import Lines, follow
from k5train.ui.runs.stamps import Stamp, stamps
from k5train.ui.runs.state import RunState, read_state

_RISEN = 1.02  # a held-out loss this many times its lowest has risen


@dataclass(frozen=True)
class Setting:
    """An option of the recipe."""

    name: str
    value: str
    is_default: bool


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that can be downloaded."""

    which: str
    """As ``k5train sample --which`` calls it: ``final``, ``best``, ``ema`` or a step."""
    path: Path
    step: int | None
    loss: float | None
    """Held out, if it was measured at this step."""
    num_bytes: int


@dataclass(frozen=True)
class RunView:
    """One run, ready to be shown."""

    root: Path
    name: str
    state: RunState
    step: int
    steps: int | None
    """How many it will make. None: its recipe cannot be read."""
    headline: str
    advice: str
    """How it goes, or what to do next; empty if there is nothing to say yet."""
    facts: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    curves: tuple[Row, ...]
    pictures: tuple[PictureStep, ...]
    settings: tuple[Setting, ...]
    recipe: str
    """As TOML; empty if it cannot be read."""
    files: tuple[LoraFile, ...]
    commands: tuple[tuple[str, str], ...]
    """What to type next, each with what it is for."""
    cache: str = ""
    """The first cache, as the run names it."""

    @property
    def share(self) -> float | None:
        """How much of the run is done, from 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else None


def read_run(root: Path, job: Job | None = None, named: Path | None = None) -> RunView:
    """A run as its files tell it. Damage to one of them costs only what that file says.

    Args:
        job: the newest job about it.
        named: what commands call its folder. None: ``root``.
    """
    state = read_state(root, job)
    problems: list[str] = []
    lines = Lines()
    if read_record(root, ()).is_ours:  # before anything in it is opened: a link may lead out, a pipe would block
        try:
            lines = follow(Run(root).metrics)
        except OSError as error:
            problems.append(f"metrics.jsonl cannot be read: {error.strerror}")
    if lines.num_broken:
        count = f"{lines.num_broken:,} lines are" if lines.num_broken > 1 else "A line is"
        problems.append(f"{count} none that the run wrote, the first in line {lines.first_broken:,} of metrics.jsonl")
    record = read_record(root, lines.rows)
    if not record.is_ours:
        return RunView(root, record.name, replace(state, word="damaged"), 0, None, "It cannot be shown", "", (),
                       record.problems, (), (), (), (), "", (), ())  # fmt: skip
    opened = _opened(root, *stamps(root, "run.json", "recipe.toml"))
    steps = _steps(lines, opened.config)
    told = [
        remark
        for remark in (*remarks(record), *opened.cautions)
        if not remark.startswith("not finished") and remark not in record.problems
    ]
    return RunView(
        root,
        record.name,
        state,
        record.steps,
        steps,
        _headline(state, record, steps, lines),
        _advice(state, record),
        tuple(_facts(record, lines, opened)),
        (*record.problems, *problems),
        tuple(told),
        tuple(_curves(lines, opened.config)),
        pictures_of(record),
        opened.settings,
        opened.recipe,
        tuple(_files(record)),
        tuple(_commands(record, named or root)),
        opened.cache,
    )


def pictures_of(record: Record) -> tuple[PictureStep, ...]:
    """What the run drew, by step, beside the base model and, for pairs, the sources and targets."""
    names = ["samples", "samples/step-000000/drawn.json"]
    for step in shared_steps([record])[-1:]:
        folder = Run(record.root).samples(step).relative_to(record.root).as_posix()
        names += [f"{folder}/drawn.json", f"{folder}/ema/drawn.json"]
    return _pictures(record.root, stamps(record.root, *names))


@lru_cache(64)
def _pictures(root: Path, stamps: tuple[Stamp, ...]) -> tuple[PictureStep, ...]:
    record = read_record(root, ())
    return tuple(step_pictures([record], compare_pictures([record])))


@dataclass(frozen=True)
class _Opened:
    """What the recipe says."""

    config: TrainConfig | None = None
    settings: tuple[Setting, ...] = ()
    recipe: str = ""
    cache: str = ""
    cautions: tuple[str, ...] = ()
    """Which of its options do nothing, or harm."""


@lru_cache(256)
def _opened(root: Path, *stamps: Stamp) -> _Opened:
    """The recipe, read once until its files change. Empty if it cannot be read, which the record's problems say."""
    try:
        _, model, config, cache = open_run(root)
        facts = read_facts(root)
    except (K5Error, OSError):
        return _Opened()
    values = flat({"model": to_dict(model), "train": to_dict(config)})
    values.pop("train.name", None)
    settings = tuple(
        Setting(name, shown_value(value), name in _defaults() and _defaults()[name] == value)
        for name, value in values.items()
    )
    text = facts.recipe
    if text is None:  # an earlier version started the run
        text = (root / "recipe.toml").read_text(encoding="utf-8", errors="replace")
    said = (*options_without_effect(config), *rate_warnings(config), *extreme_values(config))
    told = tuple(line.replace("Use --set ", "Use ") for line in said)  # on a page there is no command line
    return _Opened(config, settings, text, facts.cache if not config.data else with_urls(str(cache)), told)


@lru_cache(1)
def _defaults() -> Mapping[str, Any]:
    return flat({"model": to_dict(ModelConfig()), "train": to_dict(TrainConfig())})


def _steps(lines: Lines, config: TrainConfig | None) -> int | None:
    """How many steps the run will make: what its recipe says, or what its epochs came to."""
    if config is None:
        return None
    if config.epochs is not None:
        counted = (lines.last or {}).get("steps")
        return int(counted) if isinstance(counted, int | float) else None
    return config.steps


def _headline(state: RunState, record: Record, steps: int | None, lines: Lines) -> str:
    of = f" of {steps:,}" if steps else ""
    if state.word == "waiting":
        return f"In the queue, at step {record.steps:,}{of}"
    if state.word == "running":
        if not record.steps:
            return "Preparing the first step"
        if state.begins_again:
            return f"Preparing to go on after step {record.steps:,}"
        left = f", about {human_seconds(left)} left" if (left := seconds_left(record.steps, steps, lines)) else ""
        return f"Step {record.steps:,}{of}{left}"
    if state.word == "finished":
        took = f" in {human_seconds(record.seconds)}" if record.seconds else ""
        return f"Finished after {count_of(record.steps, 'step')}{took}"
    if state.word == "failed":
        return f"Failed at step {record.steps:,}{of}"
    return f"{'Stopped' if state.word == 'stopped' else 'It was'} at step {record.steps:,}{of}"


def seconds_left(step: int, steps: int | None, lines: Lines) -> float | None:
    """How long the steps that are left take, at the pace of the last fifty. Without pictures and measurements."""
    if not steps or lines.seconds is None or step >= steps:
        return None
    return (steps - step) * lines.seconds


def _advice(state: RunState, record: Record) -> str:
    """How the held-out loss goes, which says more than the training loss; or what can be done."""
    best, base, final = record.best, record.base, record.final
    if state.word == "stopped" and not record.steps:
        return "It has made no step. Resume it, or start it again with other settings"
    if best is None or best.loss is None or final is None:
        without = state.word in ("running", "finished") and record.steps and "held_out" not in record.curves
        return (
            "No images are held out, so that only pictures show how good it is. train.validation.split = 0.1 holds out "
            "a tenth"
            if without
            else ""
        )
    if final.loss is None:
        return "The last held-out loss is not finite: lower the learning rate"
    since = f"{best.loss:.4f} at step {best.step:,}"
    if base and base.loss is not None and final.loss > base.loss:
        return f"The held-out loss, {final.loss:.4f}, is above that of the base, {base.loss:.4f}: the rate is too high"
    if final.loss > _RISEN * best.loss:
        kept = f", and {best.file.name} has it" if best.file else ""
        return f"The held-out loss has risen to {final.loss:.4f} since its lowest, {since}{kept}"
    if final.step == best.step:
        before = f", from {base.loss:.4f} of the base" if base and base.loss is not None else ""
        return f"The held-out loss is at its lowest: {since}{before}"
    return f"The held-out loss is {final.loss:.4f}, and was lowest with {since}"


def _facts(record: Record, lines: Lines, opened: _Opened) -> list[tuple[str, str]]:
    """What is known of the last steps, and what the run was given."""
    last = lines.last or {}
    facts: list[tuple[str, str]] = []

    def add(name: str, value: Any, text: str) -> None:
        if value is not None:
            facts.append((name, text.format(value)))

    add("Held-out loss", record.final.loss if record.final else None, "{:.4f}")
    add("Lowest so far", record.best.loss if record.best else None,
        f"{{:.4f}} at step {record.best.step:,}" if record.best else "")  # fmt: skip
    add("Of the base", record.base.loss if record.base else None, "{:.4f}")
    add("Of the average", record.ema.loss if record.ema else None, "{:.4f}")
    losses = [row["loss"] for row in lines.rows if row.get("loss") is not None]
    recent = losses[-max(10, len(losses) // 20) :]
    add("Training loss", sum(recent) / len(recent) if recent else None, "{:.4f}, mean of the last steps")
    add("Learning rate", last.get("lr"), "{:.3g}")
    add("Time a step", lines.seconds, "{:.3g} s")
    add("Waiting for data", lines.waited, "{:.0%} of the time")
    peak, planned = last.get("peak_reserved_gib"), last.get("planned_gib")
    add("VRAM", peak, "{:.2f} GiB held" + (f" of {planned:.2f} planned" if planned is not None else ""))
    add("Time so far", record.seconds, "{:.0f} s" if (record.seconds or 0) < 60 else human_seconds(record.seconds or 0))
    if opened.config:
        adapter = opened.config.lora
        facts.append(("Adapter", f"{adapter.algo} of rank {adapter.rank} on {', '.join(adapter.targets)}"))
        facts.append(("Base model", opened.config.base_model_precision))
    return facts


def _curves(lines: Lines, config: TrainConfig | None) -> list[Row]:
    """The panels of ``loss.png``, and those of time and memory."""
    if not lines.rows:
        return []
    from k5train.runs.loss_panels import loss_rows, objective_of  # numpy, which pages without charts do not need

    rows = loss_rows(lines.rows, objective_of(config) if config else "", lines.steps_per_row)
    return [*rows, Row([panel for panel in (_time(lines), _memory(lines)) if panel], 190)]


def _time(lines: Lines) -> Panel | None:
    from k5train.runs.loss_panels import smooth

    seconds = [(row["step"], row["seconds"]) for row in lines.rows if row.get("seconds") is not None]
    waited = [(row["step"], row["loader_seconds"]) for row in lines.rows if row.get("loader_seconds") is not None]
    if not seconds:
        return None
    every = "a step" if lines.steps_per_row == 1 else f"means of {lines.steps_per_row:,} steps"
    drawn = [
        Line(every, seconds, PALE_GREY, 1, is_shown_whole=False),
        # Without the first, in which kernels may be compiled: it would hide all others.
        Line("running mean", smooth(seconds[1:] or seconds), COLOURS[-1]),
        Line("of it waiting for data", smooth(waited[1:] or waited), COLOURS[1]),
    ]
    return Panel("Seconds a step", drawn, x_label="steps", may_be_logarithmic=False)


def _memory(lines: Lines) -> Panel | None:
    held = [(row["step"], row["peak_reserved_gib"]) for row in lines.rows if row.get("peak_reserved_gib") is not None]
    used = [(row["step"], row["peak_allocated_gib"]) for row in lines.rows if row.get("peak_allocated_gib") is not None]
    if not held:
        return None
    planned = (lines.last or {}).get("planned_gib")
    return Panel("VRAM, GiB", [Line("held from the driver", held, COLOURS[0]), Line("used", used, GREY)],
                 levels=[Level("planned", planned, COLOURS[1])] if planned is not None else [], x_label="steps",
                 may_be_logarithmic=False)  # fmt: skip


def _files(record: Record) -> list[LoraFile]:
    """The LoRAs that are there, the finished one first, then the checkpoints from the last to the first."""
    run = Run(record.root)
    best, ema = record.best, record.ema
    held_out = dict(record.curves.get("held_out", ()))
    named: list[tuple[str, Path, int | None, float | None]] = [
        ("final", run.lora, record.steps if record.is_finished else None, held_out.get(record.steps)),
        ("best", run.best, best.step if best else None, best.loss if best else None),
        ("ema", run.ema, ema.step if ema else None, ema.loss if ema else None),
        *((str(step), path, step, held_out.get(step)) for step, path in reversed(run.checkpoints().items())),
    ]
    files = []
    for which, path, step, loss in named:
        try:
            if is_inside(record.root, path) and path.is_file():
                files.append(LoraFile(which, path, step, loss, path.stat().st_size))
        except OSError:
            continue
    return files


def _commands(record: Record, root: Path) -> Sequence[tuple[str, str]]:
    commands = [("Go on, or train longer", command("k5train", "resume", root))]
    if record.is_finished and record.lora:
        commands = [
            ("Draw more", command("k5train", "sample", root)),
            ("Which programs load it", command("k5train", "check-lora", root / record.lora.name)),
            ("In another format", command("k5train", "export", root)),
            ("To the hub", command("k5train", "push", root)),
        ]
    return [*commands, ("To send it to somebody", command("k5train", "report", root))]
