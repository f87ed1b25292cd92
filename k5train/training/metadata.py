"""What does a LoRA file say about itself? How it was trained, and the modelspec keys that other tools show."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from k5cache.shared.template import PIPELINES
from k5train.adapter.header import PIPELINE_KEY
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig
from k5train.runs.folder import Run

ARCHITECTURE = "kandinsky-5-image-lite/lora"


def metadata(data: Mixture, config: TrainConfig, identity: dict[str, Any], run: Run, step: int) -> dict[str, str]:
    """The strings in the header of the file: ``k5.*`` for us, ``modelspec.*`` by github.com/Stability-AI/ModelSpec.

    Args:
        identity: from ``identity.identity``: the recipe, the rows of the caches, the fingerprint of the base.
        step: updates done.
    """
    caches = [{"images": c["images"], "rows": c["rows"]} for name, c in identity.items() if name.startswith("cache")]
    model = data.first.manifest.recipe["model"]["source"]
    selection = data.first.manifest.recipe["selection"]
    side, trigger = selection["resolution"], selection.get("trigger")
    versions = {name: version(name) for name in ("kandinsky5-lora", "torch", "diffusers", "peft")}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        **({"modelspec.trigger_phrase": str(trigger)} if trigger else {}),
        "software": "kandinsky5-lora",
        "k5.base_model": str(model),
        "k5.base_fingerprint": identity["transformer"],
        "k5.caches": json.dumps(caches),
        "k5.recipe": json.dumps(identity["train"]),
        "k5.seed": str(config.seed),
        "k5.step": str(step),
        "k5.versions": json.dumps(versions),
        **({PIPELINE_KEY: PIPELINES["i2i"]} if data.first.kind == "i2i" else {}),
    }
