"""How does an image-to-image checkpoint show its text encoder a picture? Its preprocessor's config, as plain values.

Only image-to-image needs it. Repositories have it beside the tokenizer: ``preprocessor_config.json`` as published, or
``processor_config.json`` as newer libraries save it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k5cache.shared.errors import ModelError
from k5cache.shared.plain import read_json

FILES = ("tokenizer/preprocessor_config.json", "tokenizer/processor_config.json")
# What else is in it (names of classes and libraries, sizes of crops that are not made) changes no pixel.
_ACTING = (
    *("do_resize", "resample", "size", "min_pixels", "max_pixels", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_convert_rgb", "patch_size", "temporal_patch_size", "merge_size"),
)


def preprocessor_values(folder: Path) -> dict[str, Any]:
    """The options of the checkpoint's image processor that decide what the vision tower sees.

    Raises:
        ModelError: the checkpoint has no such config, or it cannot be read.
    """
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            document = read_json(path)
            document = document.get("image_processor", {}) if name == FILES[1] else document
            values = {key: document[key] for key in _ACTING if document.get(key) is not None}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path} cannot be read: {str(error)[:200]}", "Download the model again") from error
        if values:
            return values
    raise ModelError(
        f"The model folder {folder} lacks {FILES[0]}: image-to-image needs it to show the text encoder a picture",
        "Download the model again, with all files of its tokenizer folder",
    )
