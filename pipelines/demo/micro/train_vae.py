"""How does k5-micro's VAE learn? To draw back every icon on any background, from 16 x 16 x 16 numbers near N(0, 1).

    python -m pipelines.demo.micro.train_vae .micro build/micro --seconds 150

writes ``vae/`` (bfloat16, its ``scaling_factor`` measured), ``vae.json`` and ``vae.png`` (the curve) and
``vae_pictures.png``: originals above, what comes back below.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pipelines.demo.make_checkpoint import to_bfloat16
from pipelines.demo.micro import pictures
from pipelines.demo.micro.model import vae as new_vae
from pipelines.demo.micro.schedule import Average, Clock, arguments_of, learning_rate, write_curve

KL_WEIGHT = 3e-3
"""A nat a latent number costs as much as 0.003 of mean error. It keeps the means near 0, which matters here: Kandinsky
scales latents but does not shift them; and what is drawn is not quite what was encoded, so the decoder forgives."""


def main() -> int:
    """Train, measure the scale, write."""
    parser = argparse.ArgumentParser(description="Train k5-micro's VAE.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = arguments_of(parser)
    started, device = time.monotonic(), torch.device(arguments.device)
    drawings = pictures.read_drawings(arguments.data / "train.json.xz", arguments.limit)
    images = pictures.render(drawings, arguments.processes, arguments.pictures).to(device)
    print(f"{len(images)} drawings after {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(arguments.seed)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    rows = train(vae, images, arguments)
    scale = latent_scale(vae, images)
    print(f"latents {scale}", flush=True)
    vae.register_to_config(scaling_factor=round(1 / scale["std"], 4))
    compare(vae, images).save(arguments.out / "vae_pictures.png")
    write_curve(arguments.out / "vae", [*rows, {"step": rows[-1]["step"], **scale}], "l1")
    to_bfloat16(vae.to("cpu", memory_format=torch.contiguous_format))
    vae.save_pretrained(arguments.out / "vae")
    return 0


def train(vae: AutoencoderKL, images: Tensor, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """AdamW on random drawings; the parameters end as their moving average. Returns a row a hundredth."""
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.0
    )  # decay would only shrink what norms undo
    average, clock, rows = Average(parameters, 0.998), Clock(arguments.seconds, arguments.steps), []
    step_of = compiled(losses) if arguments.compile else losses
    step, done, next_row = 0, 0.0, 0.0
    while done < 1:
        pixels = draw_batch(images, arguments.batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments.lr, done, step, warmup=100)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            parts = step_of(vae, pixels)
        loss = parts[0] + 0.5 * parts[1] + 0.5 * parts[2] + KL_WEIGHT * parts[3]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        step += 1
        if step == 3 and arguments.steps is None:
            clock.restart()  # the first steps compile and choose kernels
        done = clock.done(step)
        if done >= next_row or done >= 1:
            next_row += 0.01
            names = ("l1", "edges", "coarse", "kl")
            row = dict(zip(names, (part.item() for part in parts), strict=True))
            rows.append({"step": step, **row, "norm": norm.item(), "seconds": clock.elapsed()})
            if len(rows) % 5 == 1 or done >= 1:
                print(" ".join(f"{name} {value:.4f}" for name, value in rows[-1].items()), flush=True)
    average.swap()
    return rows


def draw_batch(images: Tensor, size: int) -> Tensor:
    """Random drawings, half of them mirrored, on plain colours: of the captions' list, or any."""
    device = images.device
    chosen = images[torch.randint(len(images), (size,), device=device)]
    mirrored = torch.rand(size, 1, 1, 1, device=device) < 0.5
    chosen = torch.where(mirrored, chosen.flip(-1), chosen)
    named = pictures.colours(device)
    colours = named[torch.randint(len(named), (size,), device=device)]
    any_ = torch.rand(size, 3, device=device) * 255
    colours = torch.where(torch.rand(size, 1, device=device) < 0.25, any_, colours)
    return pictures.lay_on(chosen, colours).contiguous(memory_format=torch.channels_last)


def losses(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean errors of one draw: pixels, their differences to neighbours (edges), coarse pixels; and the KL, in nats."""
    mean, logvar = vae.encoder(pixels).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = vae.decoder(latents).float() - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean(), edges, coarse, kl


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, or as it was where that fails: an hour on a GPU is worth more than a tidy error."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=False)


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, images: Tensor, count: int = 2048) -> dict[str, float]:
    """What the posterior's draws look like over many pictures, in numbers."""
    torch.manual_seed(1)
    means, stds = [], []
    for _ in range(0, min(count, 4 * len(images)), 128):
        posterior = vae.encode(draw_batch(images, 128)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    mean, std = torch.cat(means), torch.cat(stds)
    total = (mean.square() + std.square()).mean() - mean.mean().square()
    by_channel = (mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3))).sqrt()
    return {
        "mean": mean.mean().item(),
        "std": total.sqrt().item(),
        "posterior_std": std.mean().item(),
        "largest_channel_mean": mean.mean(dim=(0, 2, 3)).abs().max().item(),
        "smallest_channel_std": by_channel.min().item(),
        "largest_channel_std": by_channel.max().item(),
    }


@torch.no_grad()
def compare(vae: AutoencoderKL, images: Tensor) -> Image.Image:
    """Sixteen drawings a row, each row of originals above the row of what comes back from the posterior's mean."""
    chosen = images[:: max(1, len(images) // 64)][:64]
    assert len(chosen) % 16 == 0
    named = pictures.colours(images.device)
    pixels = pictures.lay_on(chosen, named[torch.arange(len(chosen), device=images.device) % len(named)])
    back = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    rows = [half for pair in zip(torch.split(pixels, 16), torch.split(back, 16), strict=True) for half in pair]
    return pictures.grid(torch.cat(rows), 16)


if __name__ == "__main__":
    sys.exit(main())
