"""How long does a stage train, and how fast does it learn? By steps, or by seconds where a GPU's time is paid."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw


class Clock:
    """How much of a stage is done, 0 to 1: of its steps where they are given, else of its seconds."""

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        assert seconds or steps, "say --seconds, --steps or --total"
        self.seconds, self.steps, self.started = seconds, steps, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def done(self, step: int) -> float:
        """Seconds end a stage early even where steps are given."""
        by_steps = step / self.steps if self.steps else 0.0
        by_seconds = self.elapsed() / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_seconds))


class Watch:
    """Says what is done, and when. It starts with the stage, so that a stage ends in time however long it warms up."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, what: str) -> None:
        print(f"{self.elapsed():6.1f} s  {what}", flush=True)

    def training_seconds(self, arguments: argparse.Namespace, reserve: float) -> float | None:
        """How long training may take: what was asked for, or what ``--total`` leaves, ``reserve`` kept back."""
        if not arguments.total:
            seconds: float | None = arguments.seconds
            return seconds
        left = max(2.0, arguments.total - self.elapsed() - reserve)
        return min(arguments.seconds or left, left)


def learning_rate(peak: float, done: float) -> float:
    """Up over the first 4 % of the stage, then down along a cosine to a hundredth."""
    fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
    return peak * min(1.0, (done + 1e-4) / 0.04) * fall


class Average:
    """An exponential moving average of parameters, in float32; young averages forget faster."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their averages; again to go back."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options both stages share, parsed."""
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="of training, without starting up")
    parser.add_argument("--total", type=float, help="seconds for everything: training gives way")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on so many drawings only")
    parser.add_argument("--processes", type=int, default=2, help="that render")
    parser.add_argument("--pictures", type=Path, help="a .npy file to keep rendered drawings in")
    parser.add_argument("--compile", action="store_true", help="where that turns out faster")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cuda":
        torch.backends.cudnn.benchmark = True
    return arguments


def write_curve(file: Path, rows: list[dict[str, float]], name: str) -> None:
    """The rows as JSON, and ``name`` over the steps as a picture, both axes labelled by their ends."""
    file.with_suffix(".json").write_text(json.dumps(rows), encoding="utf8")
    values = [(row["step"], row[name]) for row in rows if name in row]
    if len(values) < 2:
        return
    low, high = (f(math.log(value) for _, value in values) for f in (min, max))
    width, height, last = 640, 320, values[-1][0]
    points = [
        (10 + (width - 20) * step / last, height - 20 - (height - 40) * (math.log(value) - low) / max(high - low, 1e-9))
        for step, value in values
    ]
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.line(points, fill=(40, 90, 200), width=2)
    pen.text((12, 2), f"{name}, logarithmic: {math.exp(low):.4f} to {math.exp(high):.4f}, {last:.0f} steps", "black")
    image.save(file.with_suffix(".png"))
