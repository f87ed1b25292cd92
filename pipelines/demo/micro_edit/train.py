"""How does k5-micro-edit learn to edit? It continues from k5-micro, on pairs of drawings.

    python -m pipelines.demo.micro_edit.train .micro_edit build/micro_edit --total 330 --compile

It writes ``transformer.safetensors`` and ``text_encoder.safetensors``, also half way, and beside them the curve
(``train.json``, ``train.png``) and pictures drawn half way and at the end (``drawn-50.png``, ``drawn.png``).

The rule is k5train's, ``x = (1 - sigma) * latents + sigma * noise`` and the velocity ``noise - latents``, with the
source's latents, a fresh sample of their posterior, and a channel of ones behind ``x``. One batch in nine has the empty
instruction, for guidance. In one row of ten the source's latents and its channel are zeros.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pipelines.demo.micro import model as micro
from pipelines.demo.micro import pictures
from pipelines.demo.micro.compiling import compile_if_faster, eager
from pipelines.demo.micro.data import BACKGROUNDS
from pipelines.demo.micro.schedule import Average, Clock, Watch, arguments_of, learning_rate, write_curve
from pipelines.demo.micro.train import Latents
from pipelines.demo.micro_edit import model
from pipelines.demo.micro_edit.drawings import STYLES, read
from pipelines.demo.micro_edit.instructions import Instructions, all_instructions, embed, look
from pipelines.demo.micro_edit.pairs import Batch, Tables, draw_batch, tables

P_EMPTY = 1 / 9  # of the batches: the empty instruction has a length of its own
P_NO_SOURCE = 0.1  # of the rows
SHOWN = ("fox", "mushroom", "house", "grinning cat", "automobile", "owl", "birthday cake", "frog")


def main() -> int:
    """Encode all pictures once, train, save and draw."""
    parser = argparse.ArgumentParser(description="Train k5-micro-edit.")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--start", type=Path, help="a folder with weights of an earlier call, to continue from")
    parser.add_argument("--quick", action="store_true", help="draw only a few pictures in four steps, to try it")
    watch = Watch()
    arguments = arguments_of(parser)
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    pipeline = model.start(arguments.start).to(device)
    drawings, images = read(arguments.data / "drawings.zip", arguments.limit)
    watch.say(f"{len(drawings)} drawings read")
    latents, features = encode(pipeline, images.to(device))
    watch.say(f"{len(features)} pictures encoded, std {latents.mean.float().square().mean().sqrt().item():.3f}")
    trainer = Trainer(pipeline, latents, features, tables(drawings, device), all_instructions(pipeline, device))
    curve = train(trainer, drawings, arguments, watch)
    write_curve(arguments.out / "train", curve, "loss")
    model.save_weights(pipeline, arguments.out)
    watch.say("saved")
    draw(trainer, drawings, arguments.quick).save(arguments.out / "drawn.png")
    watch.say("drew")
    return 0


@torch.no_grad()
def encode(pipeline: Any, images: Tensor, batch: int = 320) -> tuple[Latents, Tensor]:
    """Every drawing on every background, as the VAE and the vision tower see it."""
    vae: AutoencoderKL = pipeline.vae
    named = pictures.colours(images.device)
    means: list[Tensor] = []
    stds: list[Tensor] = []
    features: list[Tensor] = []
    for part in torch.split(images, batch // len(named)):
        pixels = pictures.lay_on(part.repeat_interleave(len(named), 0), named.repeat(len(part), 1))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            posterior = vae.encode(pixels).latent_dist
        for values, batches in ((posterior.mean, means), (posterior.std, stds)):
            batches.append((values.float() * vae.config.scaling_factor).permute(0, 2, 3, 1).to(torch.bfloat16))
        features.append(look(pipeline, pixels))
    return Latents(torch.cat(means), torch.cat(stds)), torch.cat(features)


class Trainer:
    """The model and what it learns from; ``loss`` is one forward pass."""

    def __init__(
        self, pipeline: Any, latents: Latents, features: Tensor, tables: Tables, groups: list[Instructions]
    ) -> None:
        self.pipeline, self.latents, self.features, self.tables, self.groups = (
            pipeline,
            latents,
            features,
            tables,
            groups,
        )
        qwen = pipeline.text_encoder.model
        self.parts = (pipeline.transformer, qwen.language_model, qwen.visual.merger.mlp)

    def loss(self, group: Instructions, batch: Batch) -> Tensor:
        """The mean square error of the velocity, float32."""
        target, source = self.latents.draw(batch.target), self.latents.draw(batch.source)
        mask = torch.ones_like(source[..., :1])
        given = (torch.rand(len(source), device=source.device) >= P_NO_SOURCE).float().view(-1, 1, 1, 1, 1)
        condition = torch.cat([source, mask], -1) * given
        noise = torch.randn_like(target)
        sigma = torch.sigmoid(torch.randn(len(target), device=target.device))
        sigma = micro.SHIFT * sigma / (1 + (micro.SHIFT - 1) * sigma)
        at = sigma.view(-1, 1, 1, 1, 1)
        embeds, pooled = embed(self.pipeline, group, batch.chosen, self.features[batch.source])
        velocity = self.velocity((1 - at) * target + at * noise, condition, sigma, embeds, pooled)
        return (velocity.float() - (noise - target)).square().mean()

    def velocity(self, noisy: Tensor, condition: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        velocity: Tensor = self.pipeline.transformer(
            hidden_states=torch.cat([noisy, condition], -1),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            visual_rope_pos=[torch.arange(n, device=noisy.device) for n in (1, 8, 8)],
            text_rope_pos=torch.arange(embeds.shape[1], device=noisy.device),
            return_dict=True,
        ).sample
        return velocity


def train(
    trainer: Trainer, drawings: list[dict[str, Any]], arguments: argparse.Namespace, watch: Watch
) -> list[dict[str, float]]:
    """Train with AdamW until the clock ends; the parameters end as their moving average. Returns the curve."""
    device = trainer.features.device
    sizes = torch.tensor([group.weight.sum().item() for group in trainer.groups])
    sizes[0] = sizes[1:].sum() * P_EMPTY / (1 - P_EMPTY)
    parameters = [parameter.requires_grad_() for part in trainer.parts for parameter in part.parameters()]

    def backward(group: Instructions) -> Tensor:
        batch = draw_batch(trainer.tables, group, arguments.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = trainer.loss(group, batch)
        torch.autograd.backward(loss)
        return loss.detach()

    def every_length() -> None:  # so that no length occurs for the first time during training
        for group in trainer.groups:
            backward(group)

    every_length()
    if arguments.compile:
        language = trainer.pipeline.text_encoder.model.language_model
        blocks = [*trainer.pipeline.transformer.visual_transformer_blocks, *language.layers]
        compile_if_faster(blocks, lambda: backward(trainer.groups[int(sizes.argmax())]), every_length, watch.say)
    torch.manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(
        parameters, lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    optimizer.zero_grad(set_to_none=True)
    watch.say(f"warmed up; lengths {[(g.ids.shape[1] - 54, len(g.texts)) for g in trainer.groups]}")
    average = Average(parameters, 0.999)
    clock = Clock(watch.training_seconds(arguments, reserve=20), arguments.steps)
    curve: list[dict[str, float]] = []
    order = torch.multinomial(sizes, 100_000, replacement=True).tolist()
    total, since, step, done, next_row, is_half_way = torch.zeros((), device=device), 0, 0, 0.0, 0.01, False
    while done < 1:
        loss = backward(trainer.groups[order[step % len(order)]])
        rate = learning_rate(arguments.lr, done)
        for options in optimizer.param_groups:
            options["lr"] = rate
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        total, since, step, done = total + loss, since + 1, step + 1, clock.done(step + 1)
        if done >= next_row:
            next_row = done + 0.01
            curve.append({"step": step, "loss": total.item() / since, "lr": rate, "seconds": clock.elapsed()})
            total, since = torch.zeros((), device=device), 0
            if len(curve) % 5 == 1:
                watch.say(" ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()))
        if not is_half_way and 0.5 <= done < 1:
            is_half_way = True
            average.swap()
            model.save_weights(trainer.pipeline, arguments.out)
            draw(trainer, drawings, arguments.quick).save(arguments.out / "drawn-50.png")
            average.swap()
    average.swap()
    watch.say(f"trained {step} steps of {arguments.batch} pairs")
    return curve


@torch.no_grad()
def draw(trainer: Trainer, drawings: list[dict[str, Any]], quick: bool, guidance: float = 3.0) -> Image.Image:
    """Draw one row per source and one column per style; the first column is the source, on a background of its own.

    The steps are those of ``FlowMatchEulerDiscreteScheduler``, in a loop of our own, because the pipeline would need an
    image processor. Sources are drawings that the model has seen.
    """
    device, steps = trainer.features.device, 4 if quick else 25
    concepts = [name for name in SHOWN if any(d["concept"] == name for d in drawings)][: 2 if quick else None]
    concepts = concepts or list(dict.fromkeys(d["concept"] for d in drawings))[:2]
    count, rows = len(BACKGROUNDS), []
    for i, concept in enumerate(concepts):
        at = [place for place, drawing in enumerate(drawings) if drawing["concept"] == concept]
        rows.append(at[i % len(at)] * count + (0, 7, 3, 8)[i % 4])
    source = torch.tensor(rows, device=device)
    columns = [trainer.latents.mean[source].float()[:, None]]
    sigmas = [*torch.linspace(1, 1 / steps, steps).tolist(), 0.0]
    with eager():
        for style in range(len(STYLES)):
            noise = torch.randn(len(rows), 1, 16, 16, 16, generator=torch.Generator().manual_seed(style)).to(device)
            columns.append(edit(trainer, noise, source, style, sigmas, guidance))
        tiles = torch.stack(columns, 1).flatten(0, 2)
        vae = trainer.pipeline.vae
        pixels = vae.decode(tiles.permute(0, 3, 1, 2) / vae.config.scaling_factor).sample
    return pictures.grid(pixels, 1 + len(STYLES))


def edit(trainer: Trainer, latents: Tensor, source: Tensor, style: int, sigmas: list[float], guidance: float) -> Tensor:
    """Latents of sources in another style, with guidance against the empty instruction for the same source."""
    picture = trainer.latents.draw(source)
    condition = torch.cat([picture, torch.ones_like(picture[..., :1])], -1)
    group = next(group for group in trainer.groups[1:] if ((group.style == style) & (group.background < 0)).any())
    first = int(((group.style == style) & (group.background < 0)).nonzero()[0])
    texts = []
    for instructions, at in ((group, first), (trainer.groups[0], 0)):
        chosen = torch.full((len(source),), at, device=source.device)
        texts.append(embed(trainer.pipeline, instructions, chosen, trainer.features[source]))
    for now, then in pairwise(sigmas):
        sigma = torch.full((len(source),), now, device=source.device)
        named, empty = (trainer.velocity(latents, condition, sigma, *text) for text in texts)
        latents = latents + (then - now) * (empty + guidance * (named - empty)).float()
    return latents


if __name__ == "__main__":
    sys.exit(main())
