"""What does the installed diffusers do to a caption? Its template, crop and cleaning, read without importing it.

Importing the pipeline takes about 6 s and loads the encoders' modelling code, which a trainer has no use for and an
encode with nothing to do should not wait for. So the template is read from the source text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

PIPELINES = {"t2i": "Kandinsky5T2IPipeline", "i2i": "Kandinsky5I2IPipeline"}


@dataclass(frozen=True)
class Template:
    """What a pipeline puts around a prompt, and how many tokens it then crops."""

    text: str
    """With one ``{}`` for the prompt."""
    encode_start_idx: int
    """Tokens of the template that are cropped from the front of the hidden states."""


def installed_template(kind: str) -> Template | None:
    """The template of the installed pipeline, ``t2i`` or ``i2i``. None if its source does not state it as constants."""
    if kind not in PIPELINES:
        return None
    try:
        return read_template(pipeline_source(kind).decode(), PIPELINES[kind])
    except (SyntaxError, UnicodeDecodeError):
        return None


@functools.lru_cache(4)
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
    if not isinstance(text, str) or text.count("{}") != 1 or not isinstance(start, int):
        return None
    return Template(text, start)


def cleaning() -> str:
    """What cleans captions, 16 hex digits: diffusers' version, its pipeline's source, ftfy's version or its absence."""
    digest = hashlib.sha256(json.dumps([version("diffusers"), version("ftfy")]).encode())
    digest.update(pipeline_source("t2i"))
    return digest.hexdigest()[:16]


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a package, which is not imported. None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pipeline_source(kind: str) -> bytes:
    """The source file of the installed pipeline; empty if there is none."""
    spec = importlib.util.find_spec("diffusers")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        return b""
    path = Path(spec.submodule_search_locations[0]) / "pipelines" / "kandinsky5" / f"pipeline_kandinsky_{kind}.py"
    try:
        return path.read_bytes()
    except OSError:
        return b""
