"""What is the selftest run on? One row at one sigma, and two captions to draw from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from k5cache.shared.checkpoint import read_config
from k5cache.store.reader import Cache, TextRow
from k5train.data.batch import Group
from k5train.data.loader import Loader
from k5train.forward.condition import condition_of
from k5train.objective import flow
from k5train.options.train import TrainConfig
from k5train.pictures.drawing import Posterior, SampleSettings

STEPS, GUIDANCE = 2, 5.0


@dataclass(frozen=True)
class Case:
    """One row at one sigma, and two captions or instructions to draw from."""

    group: Group
    prompt: TextRow
    negative: TextRow
    settings: SampleSettings
    source: Posterior | None = None
    """What the drawings edit, for image-to-image."""

    @property
    def condition(self) -> dict[str, Tensor]:
        """The argument of ``predict_velocity`` that image-to-image has besides ``inputs``."""
        return {} if self.group.condition is None else {"condition": self.group.condition}

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, sigma, prompt_embeds and pooled_projections: the arguments of ``predict_velocity``."""
        noisy = flow.add_noise(self.group.latents, self.group.noise, self.group.sigma)
        return noisy, self.group.sigma, self.group.prompt_embeds, self.group.pooled_projections

    @property
    def sizes(self) -> tuple[int, int]:
        """The tokens of the picture and of the longer caption."""
        height, width = self.group.latents.shape[2:4]
        return height // 2 * (width // 2), max(self.prompt.n_tokens, self.negative.n_tokens)


def case_of(cache: Cache | None, folder: Path, config: TrainConfig, device: torch.device) -> Case:
    """The first row that a run would see, or a random one with a side of 64 latents, or 8 for a toy model."""
    widths, scaling_factor = read_config(folder, "transformer"), read_config(folder, "vae")["scaling_factor"]
    source = None
    if cache is not None:
        undropped = TrainConfig(seed=config.seed, caption_dropout_probability=0.0)
        batch = Loader(cache, undropped, scaling_factor).batch(0)
        group, row = batch.groups[0], cache.row(batch.rows[0])
        prompt = TextRow("", group.prompt_embeds[0], group.pooled_projections[0], group.prompt_embeds.shape[1], "")
        if row.source_key:
            moments = cache.latents(row.source_key)
            source = Posterior(moments["mean"], moments.get("std"), scaling_factor)
            negative = cache.text(row.empty_key) if row.empty_key else prompt
        else:
            negative = cache.prompt("")
    else:
        side = 64 if widths["model_dim"] >= 1024 else 8
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(config.seed))
        rows = [
            TextRow("", draw(n, widths["in_text_dim"]).bfloat16(), draw(widths["in_text_dim2"]).bfloat16(), n, "")
            for n in (37, 5)
        ]
        prompt, negative = rows
        shape = (1, 1, side, side, widths["in_visual_dim"])
        group = Group(draw(shape), draw(shape), torch.tensor([0.7]), prompt.prompt_embeds[None], prompt.pooled[None])
        if widths.get("visual_cond"):
            source = Posterior(draw(shape)[0, 0].half(), 0.1 * draw(shape)[0, 0].abs().half(), scaling_factor)
            group = replace(group, condition=condition_of(source.latents))
    height, width = (8 * n for n in group.latents.shape[2:4])
    settings = SampleSettings(width, height, STEPS, GUIDANCE, seed=0)
    prompt, negative = (
        replace(row, prompt_embeds=row.prompt_embeds.to(device), pooled=row.pooled.to(device))
        for row in (prompt, negative)
    )
    return Case(group.to(device), prompt, negative, settings, source)
