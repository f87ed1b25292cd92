"""Does the installed diffusers still say about prompts what it said when this cache was made?

Its template is read off the source text: importing the pipeline would load encoder modelling, which a trainer
has no use for.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared.errors import CacheStale

if TYPE_CHECKING:
    from k5cache.store.reader import Cache


_FOLDER = "pipelines/kandinsky5"


_PIPELINES = {"t2i": "Kandinsky5T2IPipeline", "i2i": "Kandinsky5I2IPipeline"}


_SHOWN = 40  # characters of a template around the first that differs


@dataclass(frozen=True)
class Template:
    """What a pipeline puts around a prompt, and how many tokens it then crops off the front."""

    text: str
    encode_start_idx: int


def check_template(cache: Cache) -> None:
    """Refuse a cache whose captions were wrapped or cropped otherwise than the installed diffusers does.

    A LoRA trained on them would meet other embeddings for the same words when diffusers draws with it.

    Raises:
        CacheStale: they were; says what differs and under which versions.
    """
    recipe: Mapping[str, Any] = cache.manifest.recipe
    text = recipe.get("text", {})
    now = installed_template(str(recipe.get("model", {}).get("flavour", "t2i"))[:3])
    if now is None or "prompt_template" not in text:
        return
    cached = Template(text["prompt_template"], text.get("prompt_template_encode_start_idx", now.encode_start_idx))
    if cached == now:
        return
    then = cache.manifest.created_by.get("diffusers", "another version")
    if cached.text != now.text:
        was, is_now = _around(cached.text, now.text)
        what = f"other words around a prompt ({was} then, {is_now} now)"
    else:
        what = f"another crop ({cached.encode_start_idx} tokens then, {now.encode_start_idx} now)"
    pin = f", or train and draw with that version: pip install diffusers=={then}" if then[0].isdigit() else ""
    raise CacheStale(
        f"The captions in {cache.root} were encoded under diffusers {then}; {version('diffusers')}, installed now, has "
        f"{what}: a LoRA trained on them would meet other embeddings when it is used",
        f"Encode the captions again (the images are kept): k5cache encode SOURCE -o {cache.root} --update{pin}",
    )


def installed_template(kind: str) -> Template | None:
    """The template of the installed pipeline, ``t2i`` or ``i2i``; None where its source does not say it plainly."""
    found = importlib.util.find_spec("diffusers")
    if kind not in _PIPELINES or found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / _FOLDER / f"pipeline_kandinsky_{kind}.py"
    try:
        return read_template(path.read_text(encoding="utf-8"), _PIPELINES[kind])
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def read_template(source: str, pipeline: str) -> Template | None:
    """``self.prompt_template`` and its crop, as constants assigned in ``pipeline.__init__``."""
    constants = {
        target.attr: node.value.value
        for cls in ast.parse(source).body
        if isinstance(cls, ast.ClassDef) and cls.name == pipeline
        for function in cls.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    text, start = constants.get("prompt_template"), constants.get("prompt_template_encode_start_idx")
    return Template(text, start) if isinstance(text, str) and isinstance(start, int) else None


def _around(a: str, b: str) -> tuple[str, str]:
    """The neighbourhood of the first character in which two texts differ, each in quotes."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, a.rfind(" ", 0, max(0, at - _SHOWN // 2)) + 1)
    return repr(a[start : at + _SHOWN // 2]), repr(b[start : at + _SHOWN // 2])
