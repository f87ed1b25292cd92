"""How does k5-micro's VAE learn? It restores icons on any background from 16 x 16 x 16 numbers near N(0, 1).

    python -m pipelines.demo.micro.train_vae .micro build/micro --total 180 --compile

It writes ``vae/`` (bfloat16, its ``scaling_factor`` measured), ``vae.json`` and ``vae.png`` (the curve) and
``vae_pictures.png`` (originals above, reconstructions below). ``--start VAE`` continues from one, with a new optimizer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pipelines.demo.make_checkpoint import to_bfloat16
from pipelines.demo.micro import pictures
from pipelines.demo.micro.compiling import compile_if_faster, eager
from pipelines.demo.micro.model import vae as new_vae
from pipelines.demo.micro.schedule import Average, Clock, Watch, arguments_of, learning_rate, write_curve

KL_WEIGHT = 3e-3
"""One nat per latent number costs as much as a mean error of 0.003. This keeps the means near 0, which matters because
Kandinsky scales latents but does not shift them. It also makes the decoder tolerant: drawn latents are never exactly
like encoded ones."""


def main() -> int:
    """Train, measure the scale, compare with the originals and save."""
    parser = argparse.ArgumentParser(description="Train k5-micro's VAE.")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="a VAE to continue from")
    watch = Watch()
    arguments = arguments_of(parser)
    device = torch.device(arguments.device)
    drawings = pictures.read_drawings(arguments.data / "train.json.xz", arguments.limit)
    images = pictures.render(drawings, arguments.processes, arguments.pictures).to(device)
    watch.say(f"{len(images)} drawings rendered")
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKL.from_pretrained(arguments.start, torch_dtype=torch.float32) if arguments.start else new_vae()
    vae = vae.train().to(device, memory_format=torch.channels_last)
    rows = train(vae, images, arguments, watch)
    with eager():
        scale = latent_scale(vae, images)
        watch.say(f"latents {scale}")
        vae.register_to_config(scaling_factor=round(1 / scale["std"], 4))
        comparison = compare(vae, images)
    to_bfloat16(vae.to("cpu", memory_format=torch.contiguous_format))
    vae.save_pretrained(arguments.out / "vae")
    watch.say("saved")
    comparison.save(arguments.out / "vae_pictures.png")
    write_curve(arguments.out / "vae", [*rows, {"step": rows[-1]["step"], **scale}], "l1")
    return 0


def train(vae: AutoencoderKL, images: Tensor, arguments: argparse.Namespace, watch: Watch) -> list[dict[str, float]]:
    """Train with AdamW on random drawings; the parameters end as their moving average.

    Returns:
        the curve: one row per hundredth of the training.
    """
    parameters = list(vae.parameters())
    is_cuda = images.is_cuda

    def backward() -> list[Tensor]:
        pixels = vary(draw_batch(images, arguments.batch))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_cuda):
            parts = losses(vae, pixels)
        torch.autograd.backward(parts[0] + 0.5 * parts[1] + 0.5 * parts[2] + KL_WEIGHT * parts[3])
        return [part.detach() for part in parts]

    if arguments.compile:
        compile_if_faster([vae.encoder, vae.decoder], backward, backward, watch.say)
        vae.zero_grad(set_to_none=True)
    torch.manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(
        parameters, lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=is_cuda
    )  # no decay: norms would undo the shrinking
    average = Average(parameters, 0.998)
    clock = Clock(watch.training_seconds(arguments, reserve=15), arguments.steps)
    rows: list[dict[str, float]] = []
    step, done, next_row = 0, 0.0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments.lr, done)
        parts = backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        step += 1
        done = clock.done(step)
        if done >= next_row or done >= 1:
            next_row += 0.01
            names = ("l1", "edges", "coarse", "kl")
            row = dict(zip(names, (part.item() for part in parts), strict=True))
            rows.append({"step": step, **row, "norm": norm.item(), "seconds": clock.elapsed()})
            if len(rows) % 5 == 1 or done >= 1:
                watch.say(" ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    average.swap()
    return rows


def draw_batch(images: Tensor, size: int) -> Tensor:
    """Random drawings, half of them mirrored, on plain colours: three quarters named in captions, the others any."""
    device = images.device
    chosen = images[torch.randint(len(images), (size,), device=device)]
    mirrored = torch.rand(size, 1, 1, 1, device=device) < 0.5
    chosen = torch.where(mirrored, chosen.flip(-1), chosen)
    named = pictures.colours(device)
    colours = named[torch.randint(len(named), (size,), device=device)]
    unnamed = torch.rand(size, 3, device=device) * 255
    colours = torch.where(torch.rand(size, 1, device=device) < 0.25, unnamed, colours)
    return pictures.lay_on(chosen, colours).contiguous(memory_format=torch.channels_last)


def vary(pixels: Tensor) -> Tensor:
    """Turn half of the pictures into enlarged parts with swapped colours, some of them negatives.

    The VAE never sees the demo's style. This teaches it lines and colours that no drawing here has.
    """
    size, device = len(pixels), pixels.device
    scale = 0.5 + 0.5 * torch.rand(size, 1, device=device)
    x, y = ((2 * torch.rand(2, size, 1, device=device) - 1) * (1 - scale)).unbind(0)
    zero = torch.zeros_like(scale)
    part = torch.stack([torch.cat([scale, zero, x], 1), torch.cat([zero, scale, y], 1)], 1)
    grid = F.affine_grid(part, list(pixels.shape), align_corners=False)
    varied = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    order = torch.rand(size, 3, device=device).argsort(1)[:, :, None, None].expand_as(varied)
    varied = torch.gather(varied, 1, order)
    varied = torch.where(torch.rand(size, 1, 1, 1, device=device) < 0.25, -varied, varied)
    varied = torch.where(torch.rand(size, 1, 1, 1, device=device) < 0.5, varied, pixels)
    return varied.contiguous(memory_format=torch.channels_last)


def losses(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean errors of one draw: of pixels, of neighbours' differences (edges), of coarse pixels; and the KL in nats."""
    mean, logvar = vae.encoder(pixels).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = vae.decoder(latents).float() - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean(), edges, coarse, kl


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, images: Tensor, count: int = 2048) -> dict[str, float]:
    """Mean and standard deviation of the posterior's draws over many pictures."""
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
    """Draw rows of 16 originals, each above the row of their reconstructions from the posterior's mean."""
    chosen = images[:: max(1, len(images) // 64)][:64]
    assert len(chosen) % 16 == 0
    named = pictures.colours(images.device)
    pixels = pictures.lay_on(chosen, named[torch.arange(len(chosen), device=images.device) % len(named)])
    back = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    rows = [half for pair in zip(torch.split(pixels, 16), torch.split(back, 16), strict=True) for half in pair]
    return pictures.grid(torch.cat(rows), 16)


if __name__ == "__main__":
    sys.exit(main())
