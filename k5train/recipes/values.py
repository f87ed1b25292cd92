"""Which values has a recipe, and what does each of them trade for what?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from k5train.recipes.amounts import MANY, between_looks, rank_for, rows_of_update, split_for, usual_steps
from k5train.recipes.answers import Answers

ON_MICRO = "measured on the small model k5-micro, docs/settings.md"


@dataclass(frozen=True)
class Value:
    """One option of a recipe."""

    option: str
    """With its tables: ``train.lora.rank``."""
    value: Any
    why: str
    """Its trade-off, as a comment."""


def values_for(answers: Answers) -> list[Value]:
    """Every value of a recipe, in the order in which it is written."""
    return [
        *model_and_cache(answers),
        *_train(answers),
        *_adapter(answers),
        *memory(answers),
        *validation(answers, 3.5 if answers.goal == "edit" else 5.0),
    ]


def model_and_cache(answers: Answers, resolution: int = 1024) -> Iterator[Value]:
    """``[model]`` and ``[cache]``."""
    other = answers.flavour.replace("sft", "pretrain") if "sft" in answers.flavour else ""
    yield Value(
        "model.flavour",
        answers.flavour,
        f"{other} is the same model before it was tuned for good pictures. The LoRA belongs to the one it was trained "
        "on; a cache serves both."
        if other
        else "The model before it was tuned for good pictures: draw with it, or train on the sft flavour.",
    )
    yield Value(
        "cache.resolution",
        resolution,
        "The model was trained at 1024. At 768 a step takes about half as long, and at 512 a quarter, and the LoRA "
        "learns less of fine details.",
    )
    if answers.caption_strategy != "textfile":
        yield Value("cache.caption_strategy", answers.caption_strategy, "Where the captions come from.")
    if answers.instance_prompt:
        yield Value(
            "cache.instance_prompt",
            answers.instance_prompt,
            "One caption for all images: everything in them is learned as belonging to it, backgrounds too.",
        )
    if answers.trigger:
        yield Value("cache.trigger", answers.trigger, _why_trigger(answers))


def _why_trigger(answers: Answers) -> str:
    if answers.goal == "edit":
        return "Behind every instruction. Say it in the instruction when you draw."
    text = "Before every caption; say it in the prompt when you draw. A word that means nothing to the model"
    if answers.goal == "style":
        return f"{text} is learned as this style; pictures without it take on some of the style too."
    kinds = "ohwx man, ohwx cat" if answers.goal == "character" else "ohwx mug, ohwx building"
    return (
        f"{text}, with a word for its kind: {kinds}. Without regularisation data others of its kind change too: "
        f"{ON_MICRO}."
    )


def _train(answers: Answers) -> Iterator[Value]:
    rows = rows_of_update(answers.num_images)
    steps = usual_steps(answers.goal, answers.num_images, rows)
    yield Value(
        "train.steps",
        steps,
        f"For {answers.num_images} images; the table above has others. More steps learn more of your images and forget "
        "more of the rest, so look at early checkpoints too.",
    )
    if rows > 1:
        yield Value(
            "train.gradient_accumulation_steps",
            rows,
            "Rows that an update averages. It takes as many times as long, and with thousands of images it is steadier "
            "than more updates of one row. Common practice.",
        )
    yield Value(
        "train.checkpoint_every",
        between_looks(steps),
        "Each is a LoRA to draw with. More of them find the best one more exactly and take more of the disk.",
    )
    yield Value(
        "train.caption_dropout_probability",
        0.1,
        "Share of the rows that are trained without their caption, for guidance"
        + (
            ", each with the empty instruction of its own source."
            if answers.goal == "edit"
            else f". The official trainer has 0.5; 0 to 0.5 made no difference to what was learned: {ON_MICRO}."
        ),
    )
    yield Value(
        "train.flow_schedule_shift",
        1.0,
        "Above 1 trains more on noisy inputs, where the composition is decided, and less on texture. The official "
        "trainer has 3.0, SimpleTuner's quickstart 1.0. With 3.0 a little less was learned and a little more "
        f"forgotten: {ON_MICRO}.",
    )
    yield Value(
        "train.base_model_precision",
        "auto",
        "int8 weights, multiplied on int8 tensor cores where the GPU has them. "
        '"int8-quanto" multiplies the same weights in 16 bits, which is slower and rounds less. "no_change" is bf16, '
        "with twice the memory for weights.",
    )


def _adapter(answers: Answers) -> Iterator[Value]:
    rank = rank_for(answers)
    yield Value(
        "train.lora.rank",
        rank,
        "A higher rank learns more and forgets more, and makes a larger file: at the same rate, 4 learned less than "
        f"16, and 64 more than 32 ({ON_MICRO}). The official trainer has 32.",
    )
    yield Value(
        "train.lora.targets",
        ["official"],
        '"attention" and "qkv" adapt fewer layers: they learn less and leave more of the base as it was.',
    )
    several = " For thousands of images, a lower one is safer than a higher one." if answers.num_images >= MANY else ""
    yield Value("train.optim.lr", 1e-4, f"The official trainer's. {_why_rate(answers)}{several}")
    yield Value("train.optim.warmup_steps", 100, "The official trainer's. Fewer let the first updates jump.")


def _why_rate(answers: Answers) -> str:
    if answers.goal == "style":
        return (
            "A style that changes all of a picture, such as a mosaic, is learned at a third of it; three times as much "
            f"made the base forget ({ON_MICRO})."
        )
    if answers.goal == "edit":
        return "`k5train sweep` with `--list which-rate` compares four rates on your pairs."
    return (
        f"3e-4 learns in fewer steps, and only with regularisation data without harm to everything else ({ON_MICRO})."
    )


def memory(answers: Answers) -> Iterator[Value]:
    """``[train.memory]``."""
    if answers.vram is None:
        return
    small = answers.gigabytes is not None and answers.gigabytes < 10
    yield Value(
        "train.memory.vram",
        answers.vram,
        "Never use more than a card of this size has. Without this line, what is free is used. "
        + (
            "Blocks that do not fit wait in host memory; a lower rank or resolution leaves room for more of them."
            if small
            else "What does not fit is computed again in each step, so more memory is faster."
        ),
    )


def validation(answers: Answers, guidance: float, inference_steps: int = 30) -> Iterator[Value]:
    """``[train.validation]``."""
    every = between_looks(usual_steps(answers.goal, answers.num_images, rows_of_update(answers.num_images)))
    split = split_for(answers.num_images)
    if answers.prompts:
        yield Value(
            "train.validation.prompts",
            list(answers.prompts),
            "Encoded with the images, because training loads no text encoder. One that has nothing to do with your "
            "images shows whether the LoRA leaks. Each costs a picture at every look.",
        )
    yield Value("train.validation.every", every, "Steps between pictures, which come with the checkpoints.")
    yield Value("train.validation.guidance_scale", guidance, _why_guidance(guidance))
    yield Value(
        "train.validation.num_inference_steps",
        inference_steps,
        "The pipeline takes 50. 20 to 30 were reported to look as good; fewer are faster.",
    )
    if split:
        yield Value(
            "train.validation.split",
            split,
            "Images that are held out to measure on, so that `k5train compare` can name the best LoRA. They are not "
            "trained on: 0 trains on all and measures nothing.",
        )
        yield Value("train.validation.held_out_every", every, "Steps between these measurements.")


def _why_guidance(guidance: float) -> str:
    if guidance == 5.0:
        return "SimpleTuner's quickstart. The pipeline and the official trainer have 3.5; 7 and more look burnt."
    return "The pipeline's and the official trainer's. Higher follows the words more; 7 and more look burnt."
