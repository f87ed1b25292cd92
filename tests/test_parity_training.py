"""Training parity: 20 steps, or 100 with -m long, are those of diffusers + peft + AdamW written out below."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from k5cache.shared.checkpoint import read_config
from k5cache.store.reader import open_cache
from k5train.adapter import attach
from k5train.base.quantize import load_transformer
from k5train.data.batch import Batch
from k5train.data.loader import Loader
from k5train.data.prefetch import prefetch
from k5train.forward.load import execute
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.planning.plan import largest_sizes, plan_training
from k5train.training.optimizer import learning_rate, make_optimizer
from k5train.training.step import accumulate, clip_gradients, update
from tests.parity import as_the_pipeline_calls_it, reference_transformer

RANK, ALPHA, LR, WARMUP, BETAS, DECAY, CLIP = 4, 8.0, 1e-3, 10, (0.9, 0.95), 0.01, 0.05
CONFIG = TrainConfig(
    steps=100,
    batch_size=2,
    flow_schedule_shift=3.0,
    caption_dropout_probability=0.25,
    lora=LoraConfig(rank=RANK, alpha=ALPHA),
    optim=OptimConfig(lr=LR, warmup_steps=WARMUP, betas=BETAS, weight_decay=DECAY, max_grad_norm=CLIP),
    memory=MemoryConfig(),
)
OFFICIAL = [  # the official trainer's configs/trainer/lora_image.yaml
    *(f"{part}_attention.{m}" for part in ("self", "cross") for m in ("to_query", "to_key", "to_value", "out_layer")),
    *("feed_forward.in_layer", "feed_forward.out_layer"),
]
QUANTO_INCLUDE = ["*_transformer_blocks.*attention.*", "*.feed_forward.*"]


def our_steps(model, cache, precision, dtype, steps, config, device="cpu"):
    """The pieces of ``k5train.training.train.train``, without its files.

    Returns losses, norms, adapter, its start, batches."""
    transformer = load_transformer(model, precision, dtype, device)
    attach.add_lora(transformer, config.lora, config.seed)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(transformer).items()}
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.optim)
    loader = Loader(cache, config, read_config(model, "vae")["scaling_factor"])
    predict = partial(predict_velocity, transformer, gradient_checkpointing=True)
    if config.memory.execution != "auto":
        plan = plan_training(model, config, torch.device(device), largest_sizes(cache))
        execute(transformer, config, torch.device(device), plan)
    micro = config.gradient_accumulation_steps
    batches = prefetch(loader.batch, 0, steps * micro, pin=False)
    seen, losses, norms = [], [], []
    transformer.train()
    for step in range(steps):
        seen.append(list(islice(batches, micro)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim, config.steps)
        losses.append(accumulate(predict, seen[-1], cache, torch.device(device)).mean)
        norms.append(clip_gradients(parameters, config.optim.max_grad_norm).item())
        update(optimizer, norms[-1])
    return losses, norms, get_peft_model_state_dict(transformer), start, seen


def plain_steps(model, precision, dtype, start, seen: list[list[Batch]], device="cpu"):
    """The same training with diffusers, peft and torch alone: nothing of ours but the random draws."""
    transformer = reference_transformer(model, dtype, device)
    if precision == "int8-quanto":
        quantize(transformer, weights=qint8, include=QUANTO_INCLUDE)
        freeze(transformer)
    transformer.add_adapter(PeftLoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=OFFICIAL))
    for module in transformer.modules():  # peft counts on float32 adapters, which diffusers' add_adapter leaves to us
        if isinstance(module, LoraLayer):
            for part in (module.lora_A, module.lora_B):
                part.to(torch.float32)
    assert not set_peft_model_state_dict(transformer, start).unexpected_keys
    transformer.requires_grad_(False).train()
    parameters = [p.requires_grad_() for name, p in transformer.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=1e-8, weight_decay=DECAY)
    losses, norms = [], []
    for step, batches in enumerate(seen):
        groups = [group.to(torch.device(device)) for batch in batches for group in batch.groups]
        num_rows = sum(len(group.sigma) for group in groups)
        total = 0.0
        for group in groups:
            sigma = group.sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - sigma) * group.latents + sigma * group.noise
            if group.condition is not None:  # pairs: Kandinsky5I2IPipeline's input
                noisy = torch.cat([noisy, group.condition], dim=-1)
            velocity = as_the_pipeline_calls_it(
                transformer, noisy, group.sigma, group.prompt_embeds, group.pooled_projections
            )
            loss = torch.nn.functional.mse_loss(velocity.float(), group.noise - group.latents)
            share = len(group.sigma) / num_rows
            (loss * share).backward()
            total += loss.item() * share
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        for param_group in optimizer.param_groups:
            param_group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, get_peft_model_state_dict(transformer)


@pytest.mark.parametrize(
    ("precision", "dtype", "steps", "accumulation"),
    [
        ("no_change", torch.float32, 10, 1),
        pytest.param("no_change", torch.float32, 100, 1, marks=pytest.mark.long),
        ("no_change", torch.bfloat16, 6, 2),
        ("int8-quanto", torch.float32, 6, 2),
    ],
)
def test_losses_gradient_norms_and_lora_weights_are_a_plain_loops_bit_for_bit(
    toy_model, toy_cache, precision, dtype, steps, accumulation
):
    cache, config = open_cache(toy_cache("bf16")), replace(CONFIG, gradient_accumulation_steps=accumulation)
    losses, norms, ours, start, seen = our_steps(toy_model, cache, precision, dtype, steps, config)
    their_losses, their_norms, theirs = plain_steps(toy_model, precision, dtype, start, seen)
    assert losses == their_losses
    assert norms == their_norms
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What was compared is a training: weights moved, gradients were clipped, batches had several groups and lengths.
    assert min((ours[n] - start[n]).abs().max() for n in ours) > LR
    assert max(norms) > CLIP
    assert {len(batch.groups) for batches in seen for batch in batches} == {1, 2}
    assert len({group.prompt_embeds.shape[1] for batches in seen for b in batches for group in b.groups}) > 3


@pytest.mark.parametrize(
    ("dtype", "loss_rtol", "weights_rtol"), [(torch.float32, 1e-5, 0.02), (torch.bfloat16, 2e-3, 0.1)]
)
def test_the_lean_blocks_train_as_the_plain_loop_does(toy_model, toy_cache, dtype, loss_rtol, weights_rtol):
    """Three linears in one matmul, LoRA included, round differently; Adam turns a gradient near zero into a step.

    Seen after 10 steps: losses 6e-7 and 4e-4 apart, weights 0.6 % and 2.5 % of what they moved.
    """
    precision = "fp32" if dtype == torch.float32 else "bf16"
    cache = open_cache(toy_cache("bf16"))
    config = replace(CONFIG, memory=MemoryConfig(execution="eager"), mixed_precision=precision)
    losses, _, ours, start, seen = our_steps(toy_model, cache, "int8-quanto", dtype, 8, config)
    their_losses, _, theirs = plain_steps(toy_model, "int8-quanto", dtype, start, seen)
    assert losses == pytest.approx(their_losses, rel=loss_rtol)
    moved = torch.cat([(theirs[name] - start[name]).flatten() for name in ours])
    apart = torch.cat([(theirs[name] - ours[name]).flatten() for name in ours])
    assert apart.norm() < weights_rtol * moved.norm()


def test_the_adapter_sits_where_the_official_trainer_puts_it(toy_model, toy_cache):
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
    matched = attach.add_lora(transformer, LoraConfig(rank=RANK), 0)
    reference = reference_transformer(toy_model, torch.float32)
    reference.add_adapter(PeftLoraConfig(r=RANK, target_modules=OFFICIAL))
    assert set(matched.modules) == {n for n, m in reference.named_modules() if isinstance(m, LoraLayer)}
