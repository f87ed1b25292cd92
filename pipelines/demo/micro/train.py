"""How does k5-micro learn to draw? Its transformer and both text encoders together, by flow matching on latents.

    python -m pipelines.demo.micro.train .micro build/micro --total 400 --compile

It reads ``build/micro/vae`` and writes ``build/micro/model``, the whole checkpoint in bfloat16, and beside it
the curve (``train.json``, ``train.png``) and pictures that ``Kandinsky5T2IPipeline`` draws: half way (``drawn-50.png``)
and from the saved files at the end (``drawn.png``). ``--start MODEL`` continues from a checkpoint with a new optimizer.

The rule is k5train's: ``x = (1 - sigma) * latents + sigma * noise``, the velocity ``noise - latents``, sigma a sigmoid
of N(0, 1). One batch in nine has the empty caption, for guidance. The moving average of the weights is saved.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pipelines.demo.micro import model, pictures, text
from pipelines.demo.micro.compiling import compile_if_faster, eager
from pipelines.demo.micro.data import EMOJI, ICONS
from pipelines.demo.micro.schedule import Average, Clock, Watch, arguments_of, learning_rate, write_curve

CONCEPTS = (
    "fox",
    "red apple",
    "rocket",
    "owl",
    "mushroom",
    "house",
    "grinning face",
    "sun",
    "octopus",
    "birthday cake",
)
P_EMPTY = 1 / 9  # of the batches: captions of a batch have one length, and the empty one has its own


@dataclass(frozen=True)
class Latents:
    """The posterior of every row, scaled: ``[N, 16, 16, 16]`` bfloat16, channels last as the transformer takes them."""

    mean: Tensor
    std: Tensor

    def draw(self, rows: Tensor) -> Tensor:
        """``[B, 1, 16, 16, 16]`` float32."""
        mean, std = self.mean[rows].float(), self.std[rows].float()
        return (mean + std * torch.randn_like(mean))[:, None]


def main() -> int:
    """Encode all rows once, train, save, and draw with the saved model."""
    parser = argparse.ArgumentParser(description="Train k5-micro's transformer and text encoders.")
    parser.add_argument("--vae", type=Path, help="default: OUT/vae")
    parser.add_argument("--start", type=Path, help="a checkpoint to continue from, with its VAE")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true", help="draw only four small pictures, to try it on a CPU")
    watch = Watch()
    arguments = arguments_of(parser)
    device = torch.device(arguments.device)
    pipeline = model.load(arguments.start) if arguments.start else model.make(arguments.data, arguments.seed)
    if not arguments.start:
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained(arguments.vae or arguments.out / "vae"))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [(model.SIZE, model.SIZE)]
    drawings = pictures.read_drawings(arguments.data / "train.json.xz", arguments.limit)
    rows = pictures.make_rows(drawings, arguments.seed)
    watch.say("loaded")
    images = pictures.render(drawings, arguments.processes, arguments.pictures).to(device)
    watch.say(f"{len(images)} drawings rendered")
    latents = encode(pipeline.vae, images, rows)
    watch.say(f"{len(rows)} rows encoded, std {latents.mean.float().square().mean().sqrt().item():.3f}")
    difference = text.largest_difference(pipeline, ["", *(row.caption for row in rows[:8])], device)
    watch.say(f"captions as encode_prompt gives them: largest difference {difference:.1e}")
    assert difference < 2e-3, difference  # float32 kernels of two shapes; a wrong crop or norm differs by 1
    del images
    curve = train(pipeline, latents, [row.caption for row in rows], arguments, watch)
    write_curve(arguments.out / "train", curve, "loss")
    num_bytes = model.save(pipeline, arguments.out / "model")
    watch.say(f"saved, {num_bytes / 1e6:.2f} MB")
    draw(model.load(arguments.out / "model").to(device), arguments.quick).save(arguments.out / "drawn.png")
    watch.say("drew from the saved files")
    return 0


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, rows: list[pictures.Row], batch: int = 256) -> Latents:
    """Encode every row with the VAE."""
    means: list[Tensor] = []
    stds: list[Tensor] = []
    named = pictures.colours(images.device)
    drawing, background = (
        torch.tensor(values, device=images.device)
        for values in ([row.drawing for row in rows], [row.background for row in rows])
    )
    for at in torch.split(torch.arange(len(rows), device=images.device), batch):
        pixels = pictures.lay_on(images[drawing[at]], named[background[at]])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            posterior = vae.encode(pixels).latent_dist
        for values, batches in ((posterior.mean, means), (posterior.std, stds)):
            batches.append((values.float() * vae.config.scaling_factor).permute(0, 2, 3, 1).to(torch.bfloat16))
    return Latents(torch.cat(means), torch.cat(stds))


def train(
    pipeline: Any, latents: Latents, captions: list[str], arguments: argparse.Namespace, watch: Watch
) -> list[dict[str, float]]:
    """Train with AdamW until the clock ends; the parameters end as their moving average.

    Returns:
        the curve: one row per hundredth of the training.
    """
    device = latents.mean.device
    groups = [
        *text.tokenize(pipeline, [""] * len(captions), device),
        *text.tokenize(pipeline, captions, device, at_least=min(64, len(captions) // 20)),
    ]
    sizes = torch.tensor([float(len(group.rows)) for group in groups])
    sizes[0] = sizes[1:].sum() * P_EMPTY / (1 - P_EMPTY)
    watch.say(f"captions by tokens: {[(g.ids.shape[1] - 40, len(g.rows)) for g in groups[1:]]}")
    parts = (pipeline.transformer, pipeline.text_encoder.model.language_model, pipeline.text_encoder_2)
    parameters = [parameter.requires_grad_() for part in parts for parameter in part.parameters()]
    for part in parts:
        part.train()

    def backward(group: text.Captions) -> Tensor:
        chosen = group.pick(torch.randint(len(group.rows), (arguments.batch,), device=device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(pipeline, latents.draw(chosen.rows), chosen)
        torch.autograd.backward(loss)
        return loss.detach()

    def every_length() -> None:  # so that no length occurs for the first time during training
        for group in groups:
            backward(group)

    every_length()
    if arguments.compile:
        blocks = [*pipeline.transformer.visual_transformer_blocks, *pipeline.text_encoder.model.language_model.layers]
        compile_if_faster(blocks, lambda: backward(groups[int(sizes.argmax())]), every_length, watch.say)
    torch.manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(
        parameters, lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    optimizer.zero_grad(set_to_none=True)
    watch.say("warmed up")
    average = Average(parameters, 0.999)
    clock = Clock(watch.training_seconds(arguments, reserve=25), arguments.steps)
    curve: list[dict[str, float]] = []
    chosen_groups = torch.multinomial(sizes, 100_000, replacement=True).tolist()
    total, since, step, done, next_row, next_look = torch.zeros((), device=device), 0, 0, 0.0, 0.01, 0.5
    while done < 1:
        loss = backward(groups[chosen_groups[step % len(chosen_groups)]])
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
        if next_look <= done < 1:
            average.swap()
            draw(pipeline, arguments.quick).save(arguments.out / f"drawn-{next_look:.0%}.png".replace("%", ""))
            average.swap()
            next_look += 0.5
    average.swap()
    watch.say(f"trained {step} steps of {arguments.batch} rows")
    return curve


def flow_loss(pipeline: Any, latents: Tensor, captions: text.Captions) -> Tensor:
    """The mean square error of the velocity, float32."""
    prompt_embeds, pooled = text.embed(pipeline, captions)
    noise = torch.randn_like(latents)
    sigma = torch.sigmoid(torch.randn(len(latents), device=latents.device))
    sigma = model.SHIFT * sigma / (1 + (model.SHIFT - 1) * sigma)
    at = sigma.view(-1, 1, 1, 1, 1)
    velocity = pipeline.transformer(
        hidden_states=(1 - at) * latents + at * noise,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        timestep=1000 * sigma,
        visual_rope_pos=[torch.arange(n, device=latents.device) for n in (1, 8, 8)],
        text_rope_pos=torch.arange(prompt_embeds.shape[1], device=latents.device),
        return_dict=True,
    ).sample
    return (velocity.float() - (noise - latents)).square().mean()


@torch.no_grad()
def draw(pipeline: Any, quick: bool, guidance: float = 3.5) -> Image.Image:
    """Draw one row per style, the last without one, and one column per concept; a column starts from the same noise."""
    styles = [*EMOJI.values(), *list(ICONS.values())[:2], ""][-2 if quick else 0 :]
    concepts = CONCEPTS[: 2 if quick else None]
    prompts = [
        (row, column, pictures.caption(concept, style, "white"))
        for row, style in enumerate(styles)
        for column, concept in enumerate(concepts)
    ]
    groups: dict[int, list[tuple[int, int, str]]] = {}
    for prompt in prompts:
        groups.setdefault(len(pipeline.tokenizer(prompt[2])["input_ids"]), []).append(prompt)
    tiles = torch.zeros(len(prompts), 3, model.SIZE, model.SIZE)
    with eager():
        for group in groups.values():  # of one length: the pipeline would pad, and the padding would be attended to
            noise = [torch.Generator().manual_seed(column) for _, column, _ in group]
            pixels = pipeline(
                [prompt for _, _, prompt in group],
                height=model.SIZE,
                width=model.SIZE,
                num_inference_steps=4 if quick else 25,
                guidance_scale=guidance,
                generator=noise,
                output_type="pt",
            ).image
            for (row, column, _), tile in zip(group, pixels.float().cpu(), strict=True):
                tiles[row * len(concepts) + column] = 2 * tile - 1
    return pictures.grid(tiles, len(concepts))


if __name__ == "__main__":
    sys.exit(main())
