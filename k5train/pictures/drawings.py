"""What is drawn? The prompts that a recipe names, or pairs of a source and an instruction, from the cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from k5cache.buckets import drawn_by_pipeline
from k5cache.shared import console
from k5cache.shared.content import possible_hashes
from k5cache.shared.errors import RecipeError
from k5cache.shared.units import count_of
from k5cache.store.manifest import Edit
from k5cache.store.notes import arguments_of
from k5cache.store.reader import Cache
from k5train.options.validation import EditConfig, ValidationConfig
from k5train.pictures.drawing import Drawing, Posterior, SampleSettings
from k5train.pictures.saved import NAMES


def draws_any(cache: Cache, validation: ValidationConfig) -> bool:
    """Whether ``[train.validation]`` asks to draw anything."""
    return bool(validation.prompts if cache.kind == "t2i" else validation.edits or validation.pairs)


def drawings_for(cache: Cache, validation: ValidationConfig, held_out: Collection[int] = ()) -> list[Drawing]:
    """What ``[train.validation]`` asks to draw from a cache.

    Args:
        held_out: items of the validation split, which are drawn before others.

    Raises:
        CacheError: a prompt or pair is not in the cache; says how to add it.
        RecipeError: guidance needs empty instructions, and the cache has none.
    """
    if cache.kind == "t2i":
        return _prompts(cache, validation)
    if validation.edits:
        return [_of_edit(cache, find_edit(cache, edit), validation) for edit in validation.edits]
    return [_of_item(cache, item, validation) for item in items_to_draw(cache, held_out, validation.pairs)]


def sizes_to_draw(cache: Cache, validation: ValidationConfig) -> list[tuple[int, int]]:
    """(width, height) of what ``drawings_for`` gives, each once."""
    if cache.kind == "t2i":
        sizes = [_size(cache, validation)] if validation.prompts else []
    elif validation.edits:
        sizes = [(edit.width, edit.height) for edit in (find_edit(cache, edit) for edit in validation.edits)]
    else:
        rows = (cache.row(item) for item in items_to_draw(cache, (), validation.pairs))
        sizes = [(row.bucket_width, row.bucket_height) for row in rows]
    return list(dict.fromkeys(sizes))


def note_sizes(cache: Cache, validation: ValidationConfig) -> None:
    """Say where diffusers' pipeline would draw at another size than we do, and how it draws at ours."""
    others = [(size, drawn) for size in sizes_to_draw(cache, validation) if (drawn := drawn_by_pipeline(*size)) != size]
    if not others:
        return
    ours, theirs = (f"{width}x{height}" for width, height in others[0])
    more = f" and {count_of(len(others) - 1, 'more size')}" if len(others) > 1 else ""
    resolutions = ", ".join(str(size) for size, _ in others[:4]) + (", ..." if len(others) > 4 else "")
    console.note(
        f"Pictures are drawn at {ours}{more}. diffusers' pipeline rounds every size to about a megapixel, this one to"
        f" {theirs}; to draw as here, set pipe.resolutions = [{resolutions}]"
    )


def described(drawings: list[Drawing], validation: ValidationConfig) -> dict[str, Any]:
    """What is drawn, and how, as JSON. Saved beside the pictures, so that later rows of the grid are comparable."""
    labels = [drawing.label for drawing in drawings]
    if not drawings or drawings[0].source is None:
        how: dict[str, Any] = {"negative_prompt": validation.negative_prompt}
        if any(drawing.name for drawing in drawings):
            how[NAMES] = [drawing.name for drawing in drawings]
        return {"prompts": labels, **how, **(asdict(drawings[0].settings) if drawings else {})}
    pairs = [{"instruction": d.prompt.key, **asdict(d.settings)} for d in drawings]
    return {"prompts": labels, "pairs": pairs}


def items_to_draw(cache: Cache, held_out: Collection[int], count: int) -> list[int]:
    """The first items of a cache, those of the validation split first, and no picture twice because of a flip."""
    order = [*sorted(held_out), *(item for item in range(len(cache)) if item not in held_out)]
    first_of: dict[str, int] = {}
    for item in order if count else ():
        first_of.setdefault(cache.row(item).path, item)
        if len(first_of) == count:
            break
    return list(islice(first_of.values(), count))


def find_edit(cache: Cache, wanted: EditConfig) -> Edit:
    """The cached pair of a picture and an instruction: by the picture's bytes, or by its path where there is no file.

    Raises:
        CacheError: the pair is not in the cache; says how to add it.
        RecipeError: there is no such picture, or it cannot be read.
    """
    path, edits = Path(wanted.source), cache.manifest.edits
    if path.is_file():
        try:
            hashes = possible_hashes(path)
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}", "Give a picture that can be read") from error
        found = next((e for e in edits if e.prompt == wanted.prompt and e.source_hash in hashes), None)
    else:  # a cache opens anywhere, also without the pictures
        found = next((e for e in edits if (e.source, e.prompt) == (wanted.source, wanted.prompt)), None)
    if found is None and not path.is_file():
        raise RecipeError(
            f"There is no picture {path}, and {cache.root} holds no pair of this name with the instruction"
            f" {wanted.prompt!r}",
            "Give the path of a picture",
        )
    return found or cache.edit("", wanted.prompt, wanted.source)  # which raises


def _prompts(cache: Cache, validation: ValidationConfig) -> list[Drawing]:
    settings = _settings(validation, *_size(cache, validation))
    rows = [cache.prompt(prompt) for prompt in validation.prompts]
    negative = cache.prompt(validation.negative_prompt)
    names = validation.prompt_names or ("",) * len(rows)
    return [
        Drawing(prompt, row, negative, settings, name=name)
        for prompt, row, name in zip(validation.prompts, rows, names, strict=True)
    ]


def _size(cache: Cache, validation: ValidationConfig) -> tuple[int, int]:
    """Width and height of the pictures of prompts."""
    resolution = cache.manifest.recipe["selection"]["resolution"]
    return validation.width or resolution, validation.height or resolution


def _of_edit(cache: Cache, edit: Edit, validation: ValidationConfig) -> Drawing:
    name = PurePath(edit.source).name  # the folders before it would not fit above a picture
    label, size = f"{name}: {edit.prompt}", (edit.width, edit.height)
    return _pair(cache, label, size, (edit.text_key, edit.empty_key, edit.source_key), validation)


def _of_item(cache: Cache, item: int, validation: ValidationConfig) -> Drawing:
    row = cache.row(item)
    assert row.source_key is not None, "check_fit refuses rows without a source"
    label = f"{row.source_path}: {cache.text(row.caption_keys[0]).caption}"
    keys = (row.caption_keys[0], row.empty_key, row.source_key)
    return _pair(cache, label, (row.bucket_width, row.bucket_height), keys, validation, row.latent_key)


def _pair(
    cache: Cache, label: str, size: tuple[int, int], keys: tuple[str, str | None, str], validation: ValidationConfig,
    target_key: str | None = None,
) -> Drawing:  # fmt: skip
    instruction, empty, source = keys
    settings = _settings(validation, *size)
    if settings.guidance_scale > 1 and empty is None:
        again = console.command(
            "k5cache", "encode", "TARGETS", "--sources", "SOURCES", *arguments_of(cache.manifest.part),
            "-o", cache.root, "--set", "cache.empty_instruction=true",
        )  # fmt: skip
        raise RecipeError(
            f"train.validation.guidance_scale is {settings.guidance_scale:g}, and {cache.root} was encoded without the"
            " empty instruction of each source, which guidance leads away from",
            f"Set train.validation.guidance_scale=1, or encode it too: {again}",
        )
    return Drawing(
        label,
        cache.text(instruction),
        None if empty is None else cache.text(empty),
        settings,
        _posterior(cache, source),
        None if target_key is None else _posterior(cache, target_key),
    )


def _posterior(cache: Cache, key: str) -> Posterior:
    moments = cache.latents(key)
    return Posterior(moments["mean"], moments.get("std"), cache.manifest.recipe["latents"]["scaling_factor"])


def _settings(validation: ValidationConfig, width: int, height: int) -> SampleSettings:
    return SampleSettings(width, height, validation.num_inference_steps, validation.guidance_scale, validation.seed)
