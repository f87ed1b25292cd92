"""Facts of the installed pipeline without importing it: read once, then kept under ``K5_HOME``.

Importing diffusers' pipeline takes seconds, and an encode with nothing to do should end within one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from k5cache.encoders.pipeline import PipelineFacts, pipeline_facts
from k5cache.shared.home import k5_home
from k5cache.store.files import new_file

PIPELINE = "pipelines/kandinsky5/pipeline_kandinsky_t2i.py"  # in diffusers: template, crop and cleaning are in it


def cached_facts() -> PipelineFacts:
    """``pipeline_facts()``, read from ``K5_HOME`` when this very pipeline was asked before.

    The file is named by the bytes of the pipeline's source and by the versions of diffusers and ftfy, so another
    pipeline finds no facts that are not its own. A home that cannot be written costs seconds, nothing else.
    """
    path = k5_home() / f"pipeline-{cleaning()}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        found["resolutions"] = tuple((int(w), int(h)) for w, h in found["resolutions"])
        facts = PipelineFacts(**found)
        if facts.prompt_template.count("{}") == 1 and type(facts.encode_start_idx) is int:
            return facts
    facts = pipeline_facts()
    with suppress(OSError), new_file(path) as file:
        file.write(json.dumps(asdict(facts), indent=1).encode())
    return facts


def cleaning() -> str:
    """What cleans captions, 16 hex digits: diffusers' version, its pipeline's source, ftfy's version or its absence."""
    digest = hashlib.sha256(json.dumps([version("diffusers"), version("ftfy")]).encode())
    digest.update(_pipeline_source())
    return digest.hexdigest()[:16]


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a package, which is not imported; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pipeline_source() -> bytes:
    found = importlib.util.find_spec("diffusers")  # finds a top-level package without importing it
    if found is None or not found.submodule_search_locations:
        return b""
    with suppress(OSError):
        return (Path(found.submodule_search_locations[0]) / PIPELINE).read_bytes()
    return b""
