"""What is to be said before a run: which of its options do nothing, harm, or do else than their values suggest?"""

from __future__ import annotations

from collections import Counter

from k5cache.shared.checkpoint import folder_without_weights
from k5cache.shared.model import ModelConfig
from k5train.data.batch_sizes import batch_warnings
from k5train.data.folder_repeats import described
from k5train.data.kind import class_warnings
from k5train.data.mixture import Mixture, num_micro_batches
from k5train.data.split import split_off
from k5train.options.adapter import LoraConfig
from k5train.options.extremes import extreme_values
from k5train.options.rate import rate_warnings
from k5train.options.train import TrainConfig
from k5train.options.without_effect import never_reached, options_without_effect


def cautions(config: TrainConfig, data: Mixture, model: ModelConfig, num_ranks: int = 1) -> list[str]:
    """One line for each. A run and each run of a sweep print them.

    Args:
        data: the caches of the run, whole.
        model: only its transformer's config.json is read.
        num_ranks: processes that train together.

    Raises:
        RecipeError: a target of the LoRA matches nothing.
    """
    data = split_off(data, config.validation.split)
    lines = [*options_without_effect(config), *rate_warnings(config), *extreme_values(config)]
    if config.epochs is not None:
        micro_batches = num_micro_batches(data, config.batch_size, config.epochs)
        lines += never_reached(config, -(-micro_batches // (config.gradient_accumulation_steps * num_ranks)))
    notes = [*_of_folders(data), *of_parts(data), *of_doubled(data), *class_warnings(data, config)]
    lines += [*batch_warnings(data, config, num_ranks), *notes]
    return lines + (_of_lokr(config.lora, model) if config.lora.algo == "lokr" else [])


def _of_folders(data: Mixture) -> list[str]:
    """What the names of folders say, where they are asked for."""
    if not any(source.repeats_by_folder for source in data.sources):
        return []
    if images := described(data.paths()):
        return [f"By the names of their folders, an epoch has {images}"]
    return ["repeats_by_folder does nothing here: no image is in a folder with a name such as 10_cat"]


def of_parts(data: Mixture) -> list[str]:
    """Which caches are parts of a source whose other parts the run does not have."""
    parts = [(source.cache.root, part) for source in data.sources if (part := source.cache.manifest.part)]
    held: dict[int, set[int]] = {}
    for _, part in parts:
        held.setdefault(part.of, set()).update(part.numbers)
    return [
        f"{root} holds only {part.name} of its source. To train on all images, merge the parts with k5cache merge"
        for root, part in parts
        if len(held[part.of]) < part.of
    ]


def of_doubled(data: Mixture) -> list[str]:
    """Which caches are named several times, as a pattern such as cache/* and a name beside it do.

    Entries with a weight are meant so.
    """
    roots = [source.cache.root for source in data.sources if source.weight is None]
    counts, first = Counter(root.resolve() for root in roots), {root.resolve(): root for root in reversed(roots)}
    return [
        f"{first[real]} is named {count} times, so each of its images is in an epoch {count} times as often. Name it"
        " once, or with `repeats` if that is wanted"
        for real, count in counts.items()
        if count > 1
    ]


def _of_lokr(config: LoraConfig, model: ModelConfig) -> list[str]:
    from k5train.adapter.lokr import lokr_warnings  # torch and peft, which only a LoKr needs before its checks
    from k5train.adapter.targets import linear_sizes, match_targets
    from k5train.base.quantize import empty_transformer

    transformer = empty_transformer(folder_without_weights(model, ("transformer",)))
    sizes = linear_sizes(transformer)
    return lokr_warnings(config, {name: sizes[name] for name in match_targets(transformer, config.targets).modules})
