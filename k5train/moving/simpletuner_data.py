"""What do SimpleTuner's data backends mean here? Several with images become several caches.

The meanings are those of its public documentation: DATALOADER.md and HUGGINGFACE_DATASETS.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k5cache.shared.errors import RecipeError
from k5cache.shared.foreign import shown
from k5train.moving.data_keys import (
    side_of_megapixels,
    take_area,
    take_keep,
    take_regularisation,
    take_repeats,
    take_shuffle,
)
from k5train.moving.draft import CacheDraft, Draft, Entry, flag, number, text, wrong_type
from k5train.moving.read import locate
from k5train.moving.rules import (
    SAME,
    Rules,
    apply,
    many,
    needless,
    special,
    takes_for_cache,
    unsupported,
    words,
)

GLOBAL = (
    "resolution", "resolution_type", "caption_strategy", "instance_prompt", "minimum_image_size",
    "prepend_instance_prompt", "only_instance_prompt",
)  # fmt: skip
"""Keys of config.json for the backends that do not have them."""
_STRATEGIES = {
    "textfile": "textfile", "filename": "filename", "instanceprompt": "instanceprompt",
    "instance_prompt": "instanceprompt", "parquet": "metadata", "csv": "metadata", "huggingface": "metadata",
}  # fmt: skip
_SOURCES = {"local": ("instance_data_dir",), "csv": ("csv_file",), "huggingface": ("dataset_name",)}
_PAIRS = ("reference_strict", "reference_loose", "controlnet")


def _ignored(draft: Draft, entry: Entry) -> None:
    """It is read together with another key."""


def _strategy(draft: Draft, entry: Entry) -> None:
    name = text(entry).lower()
    if name not in _STRATEGIES:
        draft.say(entry, "not supported", f"cache.caption_strategy has {', '.join(sorted(set(_STRATEGIES.values())))}")
        return
    draft.take(entry, "cache.caption_strategy", _STRATEGIES[name], is_of_cache=True)


def _crop(draft: Draft, entry: Entry) -> None:
    if not flag(entry):
        draft.take(entry, "cache.crop", "none", "the whole image", is_of_cache=True)
    else:
        crop = draft.cache.options.setdefault("crop", "center")
        draft.say(entry, "taken over", f"cache.crop = {crop}")


def _crop_aspect(draft: Draft, entry: Entry) -> None:
    aspect = text(entry).lower()
    if draft.cache.options.get("crop") == "none":
        draft.say(entry, "not needed", "nothing is cropped")
    elif aspect == "preserve":
        draft.take(entry, "cache.crop", "none", "the aspect ratio is kept", is_of_cache=True)
    elif aspect in ("square", "closest"):
        buckets = {"square": "square", "closest": "native"}[aspect]
        draft.take(entry, "cache.buckets", buckets, is_of_cache=True)
    else:
        draft.say(entry, "not supported", "cache.buckets has native, square: an image has one bucket")


def _probability(draft: Draft, entry: Entry) -> None:
    if number(entry) == 1:
        draft.say(entry, "not needed", "caches are used in proportion to their size")
        return
    if not draft.is_uniform:
        draft.say(entry, "not supported", "with data_backend_sampling = uniform it is weight in [[train.data]]")
        return
    draft.cache.weight = number(entry)
    draft.say(entry, "taken over", f"train.data: weight = {draft.cache.weight:g}, the share of an epoch's rows")


def _sequence(draft: Draft, entry: Entry) -> None:
    if flag(entry):
        draft.take(entry, "cache.caption_lines", "whole", "a file is one caption", is_of_cache=True)
    else:
        draft.say(entry, "not needed", SAME)


def _shuffle(draft: Draft, entry: Entry) -> None:
    """``{"enable": true, "count": 3, "position_start": 1}``, or a flag."""
    given = entry.value if isinstance(entry.value, dict) else {"enable": entry.value}
    if flag(Entry(entry.where, entry.key, given.get("enable", False))):
        if given.get("count") is not None:
            count = Entry(entry.where, f"{entry.key}.count", given["count"])
            draft.take(count, "cache.caption_variants", number(count) + 1, "with the written order", is_of_cache=True)
        take_shuffle(draft, Entry(entry.where, entry.key, True))
        if given.get("position_start") is not None:
            start = Entry(entry.where, f"{entry.key}.position_start", given["position_start"])
            take_keep(draft, start, True)
        for key in given.keys() - {"enable", "count", "position_start"}:
            other = Entry(entry.where, f"{entry.key}.{key}", given[key])
            draft.say(other, "not supported", "tags are the parts between commas, shuffled by a seed of the caption")
    else:
        draft.say(entry, "not needed", SAME)


DATA_RULES: Rules = {
    **many(special("the cache: `k5cache encode -o cache/ID`", _ignored), "id"),
    **many(special("`local`, `csv` and `huggingface`; others are left out and named", _ignored), "type"),
    **many(special("`image`; `conditioning` for image-to-image; others need nothing or are named", _ignored),
           "dataset_type"),
    **many(special("left out, and named", _ignored), "disabled", "disable"),
    **many(special("the folder, table or dataset of `k5cache encode`", _ignored), "instance_data_dir", "csv_file",
           "dataset_name"),
    **many(needless("text embeddings are in the cache"), "default", "text_embeds", "image_embeds"),
    "resolution": special("`cache.resolution`", _ignored),
    "resolution_type": special("`cache.resolution` is the side of the square bucket", _ignored),
    "crop": special('`cache.crop`; `false` is `"none"`', _crop),
    "crop_style": takes_for_cache("cache.crop", {"center": "center", "centre": "center", "random": "random"}),
    "crop_aspect": special("`cache.buckets`: `square`, and `closest` is `native`; `preserve` is `cache.crop`",
                           _crop_aspect),
    "crop_aspect_buckets": unsupported("cache.buckets has native, square"),
    "caption_strategy": special("`cache.caption_strategy`", _strategy),
    "instance_prompt": special("`cache.instance_prompt`, or `cache.trigger` with prepend_instance_prompt", _ignored),
    **many(special("see instance_prompt", _ignored), "prepend_instance_prompt", "only_instance_prompt"),
    "minimum_image_size": special("`cache.minimum_image_size`, in pixels of a side", _ignored),
    "repeats": special("`repeats`, one more: its 0 is 1 here", lambda draft, entry: take_repeats(draft, entry, 1)),
    "probability": special("`weight` of [[train.data]]", _probability),
    **many(special("`is_regularisation_data` of [[train.data]]", take_regularisation), "is_regularisation_data",
           "is_regularization_data"),
    **many(special("`--sources` of `k5cache encode`, for image-to-image", _ignored), "conditioning_data",
           "source_dataset_id", "conditioning_type"),
    "disable_multiline_split": special('`cache.caption_lines = "whole"`, unless it is `false`', _sequence),
    "caption_shuffle": special("`cache.shuffle_tags`, `cache.caption_variants` and `cache.keep_tokens`", _shuffle),
    "caption_column": takes_for_cache("cache.caption_column"),
    "image_column": takes_for_cache("cache.image_column"),
    "split": takes_for_cache("cache.split"),
    "dataset_config": takes_for_cache("cache.dataset_config"),
    "parquet": special("the table of `k5cache encode`, `cache.caption_column` and `cache.image_column`", _ignored),
    "huggingface": special("`cache.caption_column` and `cache.image_column`", _ignored),
    "max_upscale_threshold": unsupported("cache.no_upscale skips images that would be enlarged"),
    **many(needless("images are resized to their bucket before they are cropped"), "maximum_image_size",
           "target_downsample_size"),
    **many(unsupported("images of every aspect ratio are used"), "minimum_aspect_ratio", "maximum_aspect_ratio"),
    **many(unsupported("the whole folder is used: split with a slice cuts a dataset", 0), "max_num_samples"),
    **many(unsupported("every cache is used from the first step to the last", 0, 1), "start_epoch", "start_step"),
    **many(unsupported("every cache is used from the first step to the last"), "end_epoch", "end_step"),
    **many(unsupported("noise is drawn alike for all data", 0), "timestep_sampling_offset"),
    **many(unsupported("sliders do not exist here", 0), "slider_strength"),
    **many(unsupported("pairs and masks are pictures of yours", False), "conditioning"),
    **many(unsupported("images are never deleted", False), "delete_unwanted_images", "delete_problematic_images",
           "delete_nsfw_images"),
    **words("write_batch_size", "vae_batch_size", "vae_cache_ondemand", "compress_disk_cache",
            "preserve_data_backend_cache"),
    **many(needless("the cache is where `k5cache encode -o` says"), "cache_dir", "cache_dir_vae", "cache_file_suffix",
           "cache_dir_conditioning_image_embeds", "hash_filenames", "text_cache_ondemand", "text_cache_disable",
           "text_encoder_batch_size"),
    **many(needless("k5cache encode reads and compares the images by itself"), "metadata_backend", "scan_for_errors",
           "skip_file_discovery", "metadata_update_interval", "vae_cache_disable", "vae_cache_clear_each_epoch",
           "bucket_report", "ignore_epochs"),
}  # fmt: skip


def take_backends(draft: Draft, path: Path, backends: Any, defaults: Mapping[str, Any]) -> None:
    """Make a cache of every backend with images.

    Args:
        defaults: values of config.json for backends that do not have them.

    Raises:
        RecipeError: it is not a list of backends, or there is none to use.
    """
    if not isinstance(backends, list) or not all(isinstance(backend, dict) for backend in backends):
        raise RecipeError(f"{path} is not a list of data backends", "Give SimpleTuner's multidatabackend.json")
    usable = []
    for number_, backend in enumerate(backends, 1):
        where = f"{path}, {shown(str(backend.get('id', number_)), 60)}"
        reason = _left_out(where, backend)
        if reason is None:
            usable.append((where, backend))
        elif not (backend.get("dataset_type") == "conditioning" and _is_i2i(draft) and not _is_off(where, backend)):
            _leave_out(draft, where, backend, reason)
    if not usable:
        raise RecipeError(f"{path} has no backend with images that can be encoded", "Enable one that is local")
    by_id = {str(backend.get("id")): (f"{path}, {backend.get('id')}", backend) for backend in backends}
    for where, backend in usable:
        _take_backend(draft, where, {**{k: v for k, v in defaults.items() if k not in backend}, **backend}, by_id)


def _is_i2i(draft: Draft) -> bool:
    return str(draft.value("model.flavour")).startswith("i2i")


def _is_off(where: str, backend: Mapping[str, Any]) -> bool:
    return any(flag(Entry(where, key, backend[key])) for key in ("disabled", "disable") if backend.get(key) is not None)


def _left_out(where: str, backend: Mapping[str, Any]) -> str | None:
    """Why no cache is made of a backend; None if one is."""
    kind = str(backend.get("dataset_type", "image"))
    if _is_off(where, backend):
        return "it is disabled"
    if kind in ("text_embeds", "image_embeds", "conditioning_image_embeds"):
        return "the cache has the embeddings and latents"
    if kind == "conditioning":
        return "only image-to-image has pictures before the edit; a mask is NAME.mask.png beside its image"
    if kind != "image":
        return f"data of the kind {kind:.40} is not encoded"
    if str(backend.get("type", "local")) not in _SOURCES:
        return "images are read from this machine or the hub: download them"
    return None


def _leave_out(draft: Draft, where: str, backend: Mapping[str, Any], reason: str) -> None:
    is_needless = reason.startswith(("it is disabled", "the cache"))
    kind = backend.get("dataset_type", "image")
    draft.say(
        Entry(where, "dataset_type", kind), "not needed" if is_needless else "not supported", f"left out: {reason}"
    )
    for key, value in backend.items():
        if key != "dataset_type":
            draft.say(Entry(where, key, value), "not needed", "this backend is left out")


def _take_backend(draft: Draft, where: str, backend: dict[str, Any], by_id: Mapping[str, Any]) -> None:
    draft.cache = CacheDraft(str(backend.get("id") or "images"))
    _take_source(draft, where, backend)
    apply(draft, DATA_RULES, where, backend)
    _take_sizes(draft, where, backend)
    _take_instance_prompt(draft, where, backend)
    if _is_i2i(draft):
        _take_sources(draft, where, backend, by_id)
    elif "conditioning_data" in backend:
        draft.say(Entry(where, "conditioning_data", backend["conditioning_data"]), "not supported",
                  "only image-to-image has pictures before the edit")  # fmt: skip
    draft.say_of_rest(where, backend, "it has no meaning for this data")
    draft.caches.append(draft.cache)


def _take_source(draft: Draft, where: str, backend: dict[str, Any]) -> None:
    kind = str(backend.get("type", "local"))
    for key in ("id", "type", "dataset_type", "disabled", "disable"):
        if key in backend:
            said = f"k5cache encode -o cache/{shown(draft.cache.name, 60)}" if key == "id" else SAME
            draft.say(Entry(where, key, backend[key]), "taken over" if key == "id" else "not needed", said)
    name_key = next((key for key in _SOURCES[kind] if backend.get(key)), None)
    table = backend.get("parquet") if isinstance(backend.get("parquet"), dict) else None
    if name_key is None:
        raise RecipeError(f"{where} names no images", f"Give it {_SOURCES[kind][0]}")
    entry = Entry(where, name_key, backend[name_key])
    name = text(entry)
    path = None if kind == "huggingface" else locate(name, draft.config)
    draft.cache.source = str(path) if path else name if kind == "huggingface" else str(Path(name).expanduser())
    missing = "" if path or kind == "huggingface" else ": it is not there yet"
    draft.say(entry, "taken over", f"the argument of k5cache encode{missing}")
    if table:
        _take_table(draft, where, table)
    if isinstance(backend.get("huggingface"), dict):
        _take_columns(draft, where, "huggingface", backend["huggingface"])


def _take_table(draft: Draft, where: str, table: Mapping[str, Any]) -> None:
    if isinstance(table.get("path"), str):
        draft.cache.source = str(locate(table["path"], draft.config) or Path(table["path"]).expanduser())
        draft.say(Entry(where, "parquet.path", table["path"]), "taken over", "the argument of k5cache encode")
    _take_columns(draft, where, "parquet", {k: v for k, v in table.items() if k != "path"})


def _take_columns(draft: Draft, where: str, name: str, table: Mapping[str, Any]) -> None:
    options = {"caption_column": "caption_column", "filename_column": "image_column", "image_column": "image_column"}
    for key, value in table.items():
        entry = Entry(where, f"{name}.{key}", value)
        if key in options:
            draft.take(entry, f"cache.{options[key]}", value, is_of_cache=True)
        elif key in ("width_column", "height_column", "identifier_includes_extension"):
            draft.say(entry, "not needed", "sizes and names are read from the images and the table")
        else:
            draft.say(entry, "not supported", "of a table's keys, path and the columns of captions and images exist")


def _take_sizes(draft: Draft, where: str, backend: Mapping[str, Any]) -> None:
    kind = str(backend.get("resolution_type", "pixel_area"))
    if kind not in ("pixel", "area", "pixel_area"):
        raise wrong_type(Entry(where, "resolution_type", kind), "pixel, area or pixel_area")
    if backend.get("resolution") is not None:
        take_area(draft, Entry(where, "resolution", backend["resolution"]), kind)
    if "resolution_type" in backend:
        draft.say(Entry(where, "resolution_type", kind), "taken over", "in cache.resolution")
    if backend.get("minimum_image_size") is not None:
        entry = Entry(where, "minimum_image_size", backend["minimum_image_size"])
        size = number(entry)
        pixels = side_of_megapixels(size) if 0 < size < 16 and kind == "area" else size
        draft.take(entry, "cache.minimum_image_size", pixels, "pixels of the shorter side", is_of_cache=True)


def _take_instance_prompt(draft: Draft, where: str, backend: Mapping[str, Any]) -> None:
    flags = {k: flag(Entry(where, k, backend[k])) for k in ("prepend_instance_prompt", "only_instance_prompt")
             if backend.get(k) is not None}  # fmt: skip
    options = draft.cache.options
    prompt = backend.get("instance_prompt")
    entry = Entry(where, "instance_prompt", prompt)
    is_only = flags.get("only_instance_prompt", False) or options.get("caption_strategy") == "instanceprompt"
    if prompt and is_only:
        options["caption_strategy"] = "instanceprompt"
        draft.take(entry, "cache.instance_prompt", text(entry), is_of_cache=True)
    elif prompt and flags.get("prepend_instance_prompt"):
        draft.take(entry, "cache.trigger", text(entry), "before every caption", is_of_cache=True)
    elif prompt:
        draft.say(entry, "not needed", "captions come from elsewhere")
    elif is_only:
        raise RecipeError(f"{where} asks for an instance_prompt and has none", "Give it one there")
    for key, value in flags.items():
        draft.say(Entry(where, key, value), "taken over" if value else "not needed",
                  "with instance_prompt" if value else "it is off")  # fmt: skip


def _take_sources(draft: Draft, where: str, backend: Mapping[str, Any], by_id: Mapping[str, Any]) -> None:
    """For image-to-image: the backend with the pictures before the edit."""
    given = backend.get("conditioning_data", [])
    ids = [str(name) for name in (given if isinstance(given, list) else [given])]
    own = [n for n, (_, b) in by_id.items() if str(b.get("source_dataset_id")) == str(backend.get("id"))]
    names = [name for name in dict.fromkeys([*ids, *own]) if name in by_id]
    entry = Entry(where, "conditioning_data", given)
    if not names:
        draft.say(entry, "not supported", "no conditioning data is named: pairs are found by their names")
        return
    source_where, source = by_id[names[0]]
    folder = source.get("instance_data_dir")
    kind = str(source.get("conditioning_type", _PAIRS[0]))
    if not isinstance(folder, str) or kind not in _PAIRS or str(source.get("type", "local")) != "local":
        draft.say(entry, "not supported", "the pictures before the edit must be in a local folder, and be no masks")
        return
    draft.cache.sources = str(locate(folder, draft.config) or Path(folder).expanduser())
    draft.say(entry, "taken over", f"k5cache encode --sources{f', the first of {len(names)}' if names[1:] else ''}")
    for key, value in source.items():
        is_folder = key == "instance_data_dir"
        said = "k5cache encode --sources" if is_folder else "a source is cropped and resized as its target"
        draft.say(Entry(source_where, key, value), "taken over" if is_folder else "not needed", said)
