"""Does the installed diffusers treat prompts as it did when this cache was made?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheStale
from k5cache.shared.template import Template, installed_template
from k5cache.store.notes import arguments_of

if TYPE_CHECKING:
    from k5cache.store.reader import Cache

_NUM_SHOWN = 40  # characters of a template around the first difference


def check_template(cache: Cache) -> None:
    """Refuse a cache whose captions have another template or crop than the installed diffusers uses.

    When diffusers draws with a LoRA that is trained on them, the same words have other embeddings.

    Raises:
        CacheStale: says what differs, and under which versions.
    """
    recipe: Mapping[str, Any] = cache.manifest.recipe
    text = recipe.get("text", {})
    installed = installed_template(cache.kind)
    if installed is None or "prompt_template" not in text:
        return
    start = text.get("prompt_template_encode_start_idx", installed.encode_start_idx)
    cached = Template(text["prompt_template"], start)
    if cached == installed:
        return
    if cached.text != installed.text:
        was, is_now = _around_difference(cached.text, installed.text)
        difference = f"another template ({was} then, {is_now} now)"
    else:
        difference = f"another crop ({cached.encode_start_idx} tokens then, {installed.encode_start_idx} now)"
    then = cache.manifest.created_by.get("diffusers", "another version")
    is_one = re.fullmatch(r"\d[\w.]*", then)  # parts of a merged cache may be of several versions
    pin = f", or train and draw with that version: pip install diffusers=={then}" if is_one else ""
    again = command("k5cache", "encode", "SOURCE", *arguments_of(cache.manifest.part), "-o", cache.root, "--update")
    raise CacheStale(
        f"The captions in {cache.root} were encoded under diffusers {then}, and the installed {version('diffusers')} "
        f"has {difference}: a LoRA trained on them would get other embeddings when diffusers draws with it",
        f"Encode the captions again (the images are kept): {again}{pin}",
    )


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """The text around the first character in which two texts differ, each in quotes."""
    index = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, a.rfind(" ", 0, max(0, index - _NUM_SHOWN // 2)) + 1)
    end = index + _NUM_SHOWN // 2
    return repr(a[start:end]), repr(b[start:end])
