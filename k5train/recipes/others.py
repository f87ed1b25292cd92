"""Which values do other trainers have? ``tests/test_recipes.py`` compares both with their sources."""

from __future__ import annotations

from k5train.recipes.amounts import between_looks, usual_steps
from k5train.recipes.answers import Answers
from k5train.recipes.values import Value, memory, model_and_cache, validation


def official(answers: Answers) -> list[Value]:
    """The official trainer's settings for image LoRAs: its rank, layers, shift, caption dropout, optimizer and
    guidance, on weights in bf16. What no config of it says, such as the number of steps, is ours."""
    steps = usual_steps(answers.goal, answers.num_images)
    return [
        *model_and_cache(answers),
        Value("train.steps", steps, f"For {answers.num_images} images; ours. More learn more and forget more."),
        Value("train.batch_size", 1, "Official. Larger batches are steadier and take more memory."),
        Value("train.checkpoint_every", between_looks(steps), "Ours. Each is a LoRA to draw with."),
        Value(
            "train.caption_dropout_probability",
            0.5,
            "Official: half of all rows are trained without their caption, which is good for guidance and leaves half "
            "of the rows to teach what the captions say.",
        ),
        Value(
            "train.flow_schedule_shift",
            3.0,
            "Official: more training on noisy inputs, where the composition is decided, and less on texture.",
        ),
        Value(
            "train.base_model_precision",
            "no_change",
            "Official: bf16. The weights take 11.2 GiB; in int8 they take 6.2, for gradients that are nearly the "
            "same (docs/measurements.md), and fits cards of 8 GB.",
        ),
        Value("train.objective.sigma_sampling", "sigmoid", "Official: sigmoid of a normal number."),
        Value("train.objective.weighting", "none", "Official: every sigma counts the same."),
        Value("train.objective.loss_type", "l2", 'Official. "huber" counts outliers less.'),
        Value("train.lora.rank", 32, "Official. A higher rank learns more, forgets more and makes a larger file."),
        Value("train.lora.alpha", 32, "Official: as the rank, so the LoRA acts at strength 1."),
        Value("train.lora.dropout", 0.0, "Official. Above 0 it learns less by heart, and more slowly."),
        Value("train.lora.targets", ["official"], "Official: attentions and feed-forward, ten layers of a block."),
        Value("train.optim.optimizer", "adamw", "Official. It keeps two averages of each gradient, in float32."),
        Value("train.optim.lr", 1e-4, "Official. Higher learns faster and forgets more."),
        Value("train.optim.lr_scheduler", "constant", "Official. A decay would calm the last steps."),
        Value("train.optim.warmup_steps", 100, "Official. Fewer let the first updates jump."),
        Value("train.optim.betas", [0.9, 0.95], "Official. A higher second one remembers large gradients for longer."),
        Value("train.optim.eps", 1e-8, "Official."),
        Value("train.optim.weight_decay", 0.0, "Official. Above 0 it pulls the LoRA towards doing nothing."),
        Value("train.optim.max_grad_norm", 1.0, "Official. Lower cuts more of large gradients."),
        *memory(answers),
        *validation(answers, 3.5, 50),
    ]


def simpletuner(answers: Answers) -> list[Value]:
    """The values of SimpleTuner's quickstart for Kandinsky 5.0 Image, for comparing the two trainers. `k5train import`
    takes over a setup of your own, and says what became of each key."""
    steps = usual_steps(answers.goal, answers.num_images)
    ours = {value.option: value for value in validation(answers, 5.0)}
    model, resolution = list(model_and_cache(answers))[:2]
    return [
        model,
        resolution,
        Value(
            "cache.buckets",
            "square",
            "The quickstart's crop_aspect. It cuts every image to a square; the seven native sizes keep more of it.",
        ),
        Value("train.steps", steps, f"For {answers.num_images} images; ours. More learn more and forget more."),
        Value("train.batch_size", 1, "The quickstart's. Larger batches are steadier and take more memory."),
        Value("train.gradient_accumulation_steps", 1, "The quickstart's. More rows an update take more time."),
        Value(
            "train.repeats",
            11,
            "The quickstart's repeats = 10, which counts from 0. It acts on `epochs` alone, not on steps.",
        ),
        Value("train.checkpoint_every", between_looks(steps), "Ours. Each is a LoRA to draw with."),
        Value("train.flow_schedule_shift", 1.0, "The quickstart's. The official trainer has 3.0."),
        Value("train.base_model_precision", "int8-quanto", "The quickstart's. bf16 takes 5 GiB more."),
        Value("train.lora.rank", 16, "The quickstart's. A higher rank learns more, forgets more, is a larger file."),
        Value("train.lora.targets", ["qkv"], "What SimpleTuner adapts here. More layers learn and forget more."),
        Value("train.optim.lr", 1e-4, "The quickstart's. Higher learns faster and forgets more."),
        Value(
            "train.memory.enable_group_offload",
            True,
            "The quickstart's. The weights of all blocks wait in host memory, 4.9 GiB of it. Without this line only "
            "those do that have no room on the card, which is faster.",
        ),
        Value("train.memory.group_offload_blocks_per_group", 1, "The quickstart's. More take more VRAM."),
        Value("train.memory.group_offload_use_stream", True, "The quickstart's. Copies run beside the computation."),
        *memory(answers),
        *(ours[f"train.validation.{key}"] for key in ("prompts", "every", "guidance_scale")),
        Value("train.validation.width", 1024, "The quickstart's. Smaller pictures are drawn faster."),
        Value("train.validation.height", 1024, "The quickstart's."),
        Value(
            "train.tread.routes",
            [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}],
            "The quickstart's: half of the tokens skip these blocks. A step takes about half of the arithmetic, and in "
            "as many steps less is learned: measured on the small model k5-micro, docs/settings.md. Without this line "
            "all tokens pass all blocks.",
        ),
    ]  # fmt: skip


def quick(answers: Answers) -> list[Value]:
    """A first try in minutes: half the size, a small adapter on attention alone, and a higher rate for fewer steps."""
    shorter = list(validation(answers, 5.0, 25))
    return [
        *model_and_cache(answers, 512),
        Value("train.steps", 400, "Enough to see whether captions and images teach what you mean."),
        Value("train.checkpoint_every", 200, "Each is a LoRA to draw with."),
        Value("train.lora.rank", 16, "A higher rank learns more, forgets more and makes a larger file."),
        Value("train.lora.targets", ["attention"], 'Less than "official", which adapts the feed-forward too.'),
        Value("train.optim.lr", 2e-4, "Twice the usual rate, for a short run. More forgets more."),
        Value("train.optim.warmup_steps", 40, "A tenth of the steps. Fewer let the first updates jump."),
        *memory(answers),
        *(value for value in shorter if not value.option.endswith(("split", "every"))),
        Value("train.validation.every", 200, "Steps between pictures, which come with the checkpoints."),
    ]
