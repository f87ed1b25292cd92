"""What do the datasets of kohya's sd-scripts and of musubi-tuner mean here? Every subset becomes a cache.

The meanings are those of their pages on dataset configs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from k5cache.shared.errors import RecipeError
from k5train.moving.data_keys import (
    take_extension,
    take_flip,
    take_keep,
    take_prefix,
    take_random_crop,
    take_rectangle,
    take_regularisation,
    take_repeats,
    take_shuffle,
    take_suffix,
    take_wildcards,
)
from k5train.moving.draft import CacheDraft, Draft, Entry, flag, text
from k5train.moving.read import locate
from k5train.moving.rules import Rules, apply, many, needless, special, unsupported

_FOLDERS = ("image_dir", "image_directory", "image_jsonl_file")


def _ignored(draft: Draft, entry: Entry) -> None:
    """It is read together with another key."""


def _bucket(draft: Draft, entry: Entry) -> None:
    if flag(entry):
        draft.say(entry, "not needed", "images go into the sizes that the model was trained at")
    else:
        draft.take(entry, "cache.buckets", "square", is_of_cache=True)


def _batch(draft: Draft, entry: Entry) -> None:
    if "train.batch_size" not in draft.taken:
        draft.take(entry, "train.batch_size", entry.value)
    elif str(draft.value("train.batch_size")) == str(entry.value):
        draft.say(entry, "taken over", "train.batch_size, as of the data before")
    else:
        draft.say(entry, "not supported", f"train.batch_size is {draft.value('train.batch_size')} for all data")


def _dropout(draft: Draft, entry: Entry) -> None:
    option = "train.caption_dropout_probability"
    if option not in draft.taken:
        draft.take(entry, option, entry.value, "for all data")
    elif draft.value(option) == draft.converted(entry, option, entry.value):
        draft.say(entry, "taken over", f"{option}, as of the data before")
    else:
        draft.say(entry, "not supported", f"{option} is {draft.value(option):g} for all data")


def _control(draft: Draft, entry: Entry) -> None:
    draft.cache.sources = str(locate(text(entry), draft.config) or Path(text(entry)).expanduser())
    draft.say(entry, "taken over", 'k5cache encode --sources, and model.flavour = "i2i-lite-sft"')
    draft.put("model.flavour", "i2i-lite-sft", entry.key)


DATA_RULES: Rules = {
    **many(special("the argument of `k5cache encode`", _ignored), *_FOLDERS),
    "resolution": special("`cache.resolution`, the side of a square of that area", take_rectangle),
    "num_repeats": special("`repeats`", take_repeats),
    "batch_size": special("`train.batch_size`, of the first dataset", _batch),
    "caption_extension": special("`cache.caption_extension`, unless it is `.txt`", take_extension),
    "enable_bucket": special('not needed; `false` is `cache.buckets = "square"`', _bucket),
    "flip_aug": special("`cache.flip`", take_flip),
    "random_crop": special("`cache.crop`", take_random_crop),
    "is_reg": special("`is_regularisation_data` of [[train.data]]", take_regularisation),
    "caption_prefix": special("`cache.caption_prefix`", take_prefix),
    "caption_suffix": special("`cache.caption_suffix`", take_suffix),
    "shuffle_caption": special("`cache.shuffle_tags`", take_shuffle),
    "keep_tokens": special("`cache.keep_tokens`, with shuffle_caption", _ignored),
    "enable_wildcard": special("`cache.wildcards`. Without it `cache.caption_lines`: sd-scripts uses a file's first"
                               " line, musubi-tuner all of it", take_wildcards),
    "caption_separator": unsupported("tags are the parts between commas", ",", ", "),
    "class_tokens": special("`cache.instance_prompt`, for a folder without captions", _ignored),
    "caption_dropout_rate": special("`train.caption_dropout_probability`, of the first dataset", _dropout),
    "control_directory": special("`k5cache encode --sources`, for image-to-image", _control),
    **many(needless("the cache is where `k5cache encode -o` says"), "cache_directory", "cache_info"),
    **many(needless("images go into the sizes that the model was trained at"), "min_bucket_reso", "max_bucket_reso",
           "bucket_reso_steps"),
    "bucket_no_upscale": unsupported("cache.no_upscale skips images that would be enlarged", False),
    **many(unsupported("no tags are left out of captions", False, 0, 1), "caption_tag_dropout_rate",
           "token_warmup_min", "token_warmup_step"),
    **many(unsupported("tags are the parts between commas, and keep_tokens counts those that stay"),
           "keep_tokens_separator", "secondary_separator"),
    **many(unsupported("pictures keep their colours", False), "color_aug", "face_crop_aug_range"),
    **many(unsupported("masks are NAME.mask.png beside their images", False), "alpha_mask", "mask_directory"),
    **many(unsupported("only images are trained on"), "video_directory", "video_jsonl_file", "target_frames",
           "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps"),
    "metadata_file": unsupported("captions are in .txt files, or in a .jsonl, .csv or .parquet table"),
    "multiple_target": unsupported("an image has one target", False),
}  # fmt: skip


def take_datasets(draft: Draft, path: Path, tables: Any, defaults: Mapping[str, Any]) -> None:
    """Make a cache of every dataset, or of every subset that it has.

    Args:
        defaults: keys of the training config that count where a dataset does not have them.

    Raises:
        RecipeError: it is not a dataset config, or there is nothing to encode.
    """
    if not isinstance(tables, dict) or not isinstance(tables.get("datasets"), list):
        raise RecipeError(f"{path} is not a dataset config: it has no [[datasets]]", "Give it with --data")
    for key in tables.keys() - {"general", "datasets"}:
        draft.say(Entry(str(path), key, tables[key]), "unknown", "no table of a dataset config")
    general = tables.get("general", {})
    if not isinstance(general, dict):
        raise RecipeError(f"{path}: general must be a table", "Write it as [general]")
    for where, dataset in _parts(path, tables["datasets"]):
        _take(draft, where, {**defaults, **general, **dataset})
    if not draft.caches:
        raise RecipeError(f"{path} has no folder of images", "Give a dataset an image_dir or image_directory")


def _parts(path: Path, datasets: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, dataset in enumerate(datasets, 1):
        if not isinstance(dataset, dict):
            raise RecipeError(f"{path}: dataset {number} is not a table", "Write it as [[datasets]]")
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        subsets = dataset.get("subsets")
        if subsets is None:
            yield f"{path}, dataset {number}", own
            continue
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            raise RecipeError(f"{path}: the subsets of dataset {number} are not tables", "Write [[datasets.subsets]]")
        for inner, subset in enumerate(subsets, 1):
            yield f"{path}, dataset {number}.{inner}", {**own, **subset}


def _take(draft: Draft, where: str, dataset: dict[str, Any]) -> None:
    key = next((key for key in _FOLDERS if dataset.get(key)), None)
    if key is None:
        for other, value in dataset.items():
            draft.say(Entry(where, other, value), "not supported", "left out: it has no images")
        return
    name = text(Entry(where, key, dataset[key]))
    folder = locate(name, draft.config)
    source = folder or Path(name).expanduser()
    draft.cache = CacheDraft(source.stem if key == "image_jsonl_file" else source.name or "images", str(source))
    missing = "" if folder else ": it is not there yet"
    draft.say(Entry(where, key, name), "taken over", f"the argument of k5cache encode{missing}")
    apply(draft, DATA_RULES, where, dataset)
    if dataset.get("keep_tokens") is not None:
        entry = Entry(where, "keep_tokens", dataset["keep_tokens"])
        take_keep(draft, entry, dataset.get("shuffle_caption"))
    _take_class(draft, where, dataset, source)
    _take_lines(draft, key)
    draft.say_of_rest(where, dataset, "it has no meaning for this data")
    draft.caches.append(draft.cache)


def _take_lines(draft: Draft, folder_key: str) -> None:
    """What a file of several lines is: sd-scripts uses its first line, musubi-tuner all as one caption."""
    options = draft.cache.options
    if folder_key != "image_jsonl_file" and not options.get("wildcards") and "instance_prompt" not in options:
        options["caption_lines"] = "first" if folder_key == "image_dir" else "whole"


def _take_class(draft: Draft, where: str, dataset: Mapping[str, Any], folder: Path) -> None:
    """``class_tokens`` is the caption of images without a caption file."""
    if not dataset.get("class_tokens"):
        return
    entry = Entry(where, "class_tokens", dataset["class_tokens"])
    if folder.is_dir() and any(path.suffix.lower() in (".txt", ".caption") for path in folder.iterdir()):
        draft.say(entry, "not needed", "the folder has captions")
        return
    draft.cache.options["caption_strategy"] = "instanceprompt"
    draft.take(entry, "cache.instance_prompt", text(entry), "the caption of every image", is_of_cache=True)
