"""Which sources, targets and instructions does a batch have? Drawn at random on the GPU, from tables made once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.demo.micro.data import BACKGROUNDS
from pipelines.demo.micro_edit.drawings import STYLES
from pipelines.demo.micro_edit.instructions import Instructions

P_SAME = 0.15  # how often the source is the target itself, on the background before: what is asked for is there already
P_WHITE = 0.3  # how often the source's background is white; the others share the rest


@dataclass(frozen=True)
class Tables:
    """Every drawing stands on every background: picture ``drawing * 10 + background``."""

    of_style: Tensor
    """``[7, most]``: the drawings of each style, repeated to one length."""
    partners: Tensor
    """``[N, 60]``: the same concept in other styles, repeated to a multiple of every number of them up to six."""


def tables(drawings: list[dict[str, Any]], device: torch.device) -> Tables:
    """Tables of drawings, each of which has a concept that another style draws too."""
    by_style: dict[int, list[int]] = defaultdict(list)
    by_concept: dict[str, list[int]] = defaultdict(list)
    for i, drawing in enumerate(drawings):
        by_style[drawing["style"]].append(i)
        by_concept[drawing["concept"]].append(i)
    most = max(map(len, by_style.values()))
    of_style = [repeated(by_style[style], most) for style in range(len(STYLES))]
    partners = [
        repeated([j for j in by_concept[drawing["concept"]] if j != i], 60) for i, drawing in enumerate(drawings)
    ]
    return Tables(torch.tensor(of_style, device=device), torch.tensor(partners, device=device))


def repeated(values: list[int], count: int) -> list[int]:
    """The values over and over, ``count`` in all."""
    return (values * (count // len(values) + 1))[:count]


@dataclass(frozen=True)
class Batch:
    """Places of pictures and of instructions, each ``[B]``."""

    source: Tensor
    target: Tensor
    chosen: Tensor


def draw_batch(tables: Tables, group: Instructions, size: int) -> Batch:
    """Instructions of one length, targets in the styles they name, and mostly another drawing of it as a source."""
    device = tables.partners.device
    chosen = torch.multinomial(group.weight, size, replacement=True)
    style = group.style[chosen]
    style = torch.where(style < 0, torch.randint(len(STYLES), (size,), device=device), style)
    target = tables.of_style[style, torch.randint(tables.of_style.shape[1], (size,), device=device)]
    source = tables.partners[target, torch.randint(tables.partners.shape[1], (size,), device=device)]
    source = torch.where(torch.rand(size, device=device) < P_SAME, target, source)
    count = len(BACKGROUNDS)  # white is the first of them
    before = torch.randint(1, count, (size,), device=device) * (torch.rand(size, device=device) > P_WHITE)
    after = torch.where(group.background[chosen] < 0, before, group.background[chosen])
    return Batch(source * count + before, target * count + after, chosen)
