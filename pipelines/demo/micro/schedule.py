"""How long does a stage train, and at which learning rate? Steps set its length, or seconds if a GPU's time costs."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw


class Clock:
    """How much of a stage is done, 0 to 1, counted in steps, in seconds or in both."""

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        assert seconds or steps, "say --seconds, --steps or --total"
        self.seconds, self.steps, self.started = seconds, steps, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def done(self, step: int) -> float:
        """The share done after ``step`` steps. If steps and seconds are given, the larger share counts."""
        by_steps = step / self.steps if self.steps else 0.0
        by_seconds = self.elapsed() / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_seconds))


class Watch:
    """Prints progress with the time since the stage started, warming up included, and keeps ``--total``."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, message: str) -> None:
        print(f"{self.elapsed():6.1f} s  {message}", flush=True)

    def training_seconds(self, arguments: argparse.Namespace, reserve: float) -> float | None:
        """How long training may take: ``--seconds``, but no longer than ``--total`` leaves, minus ``reserve``."""
        if not arguments.total:
            seconds: float | None = arguments.seconds
            return seconds
        left = max(2.0, arguments.total - self.elapsed() - reserve)
        return min(arguments.seconds or left, left)


def learning_rate(peak: float, done: float) -> float:
    """The rate rises over the first 4 % of the stage, then falls along a cosine to a hundredth of ``peak``."""
    fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
    return peak * min(1.0, (done + 1e-4) / 0.04) * fall


class Average:
    """An exponential moving average of parameters, in float32. A young average forgets faster."""

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
        """Exchange the parameters with their averages; a second call exchanges them back."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(before)


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options that both stages share, and parse."""
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="seconds of training, not counting the start")
    parser.add_argument("--total", type=float, help="seconds for everything; training gets what is left")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train only on so many drawings")
    parser.add_argument("--processes", type=int, default=2, help="how many processes render")
    parser.add_argument("--pictures", type=Path, help="a .npy file for the rendered drawings")
    parser.add_argument("--compile", action="store_true", help="compile if that is faster")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cuda":
        torch.backends.cudnn.benchmark = True
    return arguments


def write_curve(file: Path, rows: list[dict[str, float]], name: str) -> None:
    """Write the rows as JSON, and a picture of ``name`` over the steps with the ends of both axes."""
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
