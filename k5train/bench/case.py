"""What does `k5train bench` measure? Its cases, one a line of the table, and the random inputs that they run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from k5cache.shared.console import parse_bytes
from k5cache.shared.vram import for_torch
from k5train.base.quantize import Precision
from k5train.bench.kernels import Share, by_group, limit_of, longest, spent_on, without_adapters_apart
from k5train.bench.timing import Seen
from k5train.forward import routing
from k5train.forward.condition import condition_of
from k5train.objective import tread
from k5train.options.objective import RouteConfig, TreadConfig

Baseline = Literal["eager", "compiled"]
NUM_LONGEST = 12  # kernels that are listed one by one
I2I = "I2I, "  # how the name of a case begins that edits images; the rest is that of the case to compare it with


@dataclass(frozen=True)
class Case:
    """One line of the bench."""

    precision: Precision
    cap_gib: float | None
    """What torch may reserve. None: all that the card has."""
    side: int = 1024
    batch_size: int = 1
    num_text_tokens: int = 256
    rank: int = 16
    targets: tuple[str, ...] = ("qkv",)
    execution: str = "auto"
    graph: Literal["auto", "off"] = "auto"
    """Whether steps are captured as CUDA graphs, as ``train.memory.graph``."""
    tread: float = 0.0
    """Share of the picture's tokens that skip the blocks of ``TREAD_BLOCKS``."""
    is_i2i: bool = False
    """Whether the transformer edits images: its input has a source's channels too."""

    @property
    def name(self) -> str:
        """Precision, cap, size, batch and adapter, as the table shows them."""
        cap = f"{self.cap_gib:g} GiB" if self.cap_gib else "all VRAM"
        tread = f", TREAD {self.tread:g}" if self.tread else ""
        adapter = f"r{self.rank} {'+'.join(self.targets)}"
        text = f", {self.num_text_tokens} text tokens" if self.num_text_tokens != Case.num_text_tokens else ""
        kind = I2I if self.is_i2i else ""
        launched = ", no graph" if self.graph == "off" else ""
        return (
            f"{kind}{self.precision}, {cap}, {self.side} px, batch {self.batch_size}, {adapter}{text}{tread}{launched}"
        )

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A transformer's config.json, for the kind of this case."""
        return {**config, "visual_cond": True} if self.is_i2i else config


@dataclass(frozen=True)
class Measured:
    """What a step of one case took."""

    name: str
    milliseconds: float
    """Median: forward, backward, clip, AdamW."""
    fastest: float
    predicted_gib: float | None
    reserved_gib: float | None
    tflops: float
    """A second, of the arithmetic that the step needs; recompute is not counted."""
    plan: str
    first_step_seconds: float
    """With compilation."""
    baseline: Baseline | None = None
    """How diffusers ran. None: this is ours."""
    busy: float | None = None
    """Milliseconds in which the GPU computes. Near the median, the GPU is the limit; far below it, launching is."""
    waiting: float = 0.0
    """Milliseconds in which it waits for weights that are copied."""
    spent: dict[str, float] | None = None
    """Milliseconds that it computes for each thing that can limit the step."""
    groups: dict[str, Share] | None = None
    """What each group of kernels takes."""
    longest: tuple[tuple[str, str, Share], ...] = ()
    """Group and name of the kernels that take longest, and what they take."""

    @property
    def limit(self) -> str | None:
        """What limits the step, in words. None: nobody looked."""
        if self.spent is None or self.busy is None:
            return None
        return limit_of(self.milliseconds, self.spent, self.busy, self.waiting)

    def on_gpu(self, seen: Seen | None) -> Measured:
        """The same with what a step does on the GPU, if it was seen."""
        if seen is None:
            return self
        launches = without_adapters_apart(seen.launches) if self.baseline else seen.launches
        return replace(
            self,
            busy=seen.busy,
            waiting=seen.waiting,
            spent=spent_on(launches),
            groups=by_group(launches),
            longest=tuple(longest(launches, NUM_LONGEST)),
        )

    def seen_in(self, other: Measured) -> Measured:
        """The same with what a step of ``other``, which is the same case, does on the GPU."""
        return replace(
            self,
            busy=other.busy,
            waiting=other.waiting,
            spent=other.spent,
            groups=other.groups,
            longest=other.longest,
        )


QUICK = (Case("int8-quanto", None), Case("int8-dynamic", None))
MUST_REACH = (Case("int8-quanto", 16), Case("int8-dynamic", 16), Case("int8-quanto", 8.5), Case("int8-quanto", 4.5))
SIZES = tuple(
    Case(precision, 16, side, batch, rank=rank, targets=targets, tread=tread)
    for precision in ("int8-quanto", "int8-dynamic")
    for side, batch, rank, targets, tread in (
        (512, 1, 16, ("qkv",), 0.0),
        (768, 1, 16, ("qkv",), 0.0),
        (512, 4, 16, ("qkv",), 0.0),
        (1024, 2, 16, ("qkv",), 0.0),
        (1024, 4, 16, ("qkv",), 0.0),
        (1024, 1, 64, ("official",), 0.0),
        (1024, 1, 16, ("qkv",), 0.5),
    )
)
CARDS = tuple(round(for_torch(parse_bytes(card)) / 2**30, 2) for card in ("12GB", "8GB"))
"""What torch has of cards of these sizes."""
_CAPS: tuple[tuple[Precision, tuple[float, ...]], ...] = (("int8-quanto", CARDS), ("int8-dynamic", (16, *CARDS)))
EDITS = tuple(
    Case(precision, cap, num_text_tokens=500, is_i2i=is_i2i)
    for precision, caps in _CAPS
    for cap in caps
    for is_i2i in (False, True)
)
"""Image-to-image, each case after text-to-image with as many text tokens."""
TREAD_BLOCKS = (2, -3)
"""First and last visual block that dropped tokens skip."""


def tread_of(case: Case) -> TreadConfig:
    """The case's TREAD options."""
    return TreadConfig(routes=(RouteConfig(case.tread, *TREAD_BLOCKS),) if case.tread else ())


def routes_for(case: Case, device: torch.device, config: TreadConfig | None = None) -> tuple[routing.Route, ...]:
    """The TREAD routes of the case, or of ``config``, with tokens drawn for each row."""
    config = config or tread_of(case)
    if not config.routes:
        return ()
    generator = torch.Generator().manual_seed(4)
    rows = [tread.token_scores((case.side // 16) ** 2, generator) for _ in range(case.batch_size)]
    routes = tread.choose(torch.stack(rows)[:, None], config, 0, 1)
    return tuple(replace(route, kept=route.kept.to(device)) for route in routes)


def condition_for(case: Case, config: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The random latents of a source and the mask channel, as an argument of ``predict_velocity``; none for T2I."""
    if not case.is_i2i:
        return {}
    shape = (case.batch_size, 1, case.side // 8, case.side // 8, config["in_visual_dim"])
    return {
        "condition": condition_of(torch.randn(shape, generator=torch.Generator(device).manual_seed(2), device=device))
    }


def inputs_for(case: Case, config: dict[str, Any], device: torch.device) -> tuple[Tensor, ...]:
    """Random latents, sigma, prompt_embeds and pooled_projections."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    latents = normal(case.batch_size, 1, case.side // 8, case.side // 8, config["in_visual_dim"])
    text = normal(case.batch_size, case.num_text_tokens, config["in_text_dim"])
    sigma = torch.rand(case.batch_size, generator=generator, device=device)
    return latents, sigma, text.bfloat16(), normal(case.batch_size, config["in_text_dim2"]).bfloat16()
