"""Is a resumed run still the same run? What may change between a run and its resumption."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared.errors import RunError
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.recipe import to_dict
from k5train.options.removed import without_removed
from k5train.options.train import TrainConfig
from k5train.planning.saved_plan import read_saved_plan
from k5train.runs.resume_state import SavedState, differences

if TYPE_CHECKING:
    from k5train.data.mixture import Mixture


# What may change between a run and its resumption: none of it changes the numbers of a step, but for the rounding of
# another memory plan. ``may_change`` makes exceptions for what the run is.
FREE = (
    "name",
    "steps",
    "epochs",
    "max_hours",
    "checkpoint_every",
    "checkpoints_total_limit",
    "loss_limit",
    "device",
    "memory",
    "trackers",
    *(f"validation.{name}" for name in ("prompts", "negative_prompt", "every", "guidance_scale", "num_inference_steps",
      "width", "height", "seed", "before", "held_out_every", "patience")),
)  # fmt: skip


def identity(data: Mixture, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a run to go on: the recipe, the caches' rows, and the base model's weights."""
    caches = {}
    for number, source in enumerate(data.sources):
        manifest = source.cache.manifest
        caches[f"cache{number or ''}"] = {
            "images": len(source.cache),
            "rows": _rows(source.cache),
            "recipe": manifest.recipe,
        }
    return {"train": to_dict(config), **caches, "transformer": fingerprint(folder, "transformer")}


def check_same(saved: SavedState, now: Mapping[str, Any]) -> None:
    """Refuse to go on with anything that changes the numbers.

    Raises:
        RunError: names every field that differs.
    """
    before, now = _without_paths(saved.facts["identity"]), _without_paths(now)
    free = [f"train.{name}" for name in may_change(saved, now["train"])]
    # A name, which an encode may note later; the weights that it stands for are compared by their fingerprints.
    free += [f"{name}.recipe.model.revision" for name in now if name.startswith("cache")]
    differing = differences(before, dict(now), free)
    for i, (field, _, _) in enumerate(line.partition(": ") for line in differing):
        if field.endswith(".rows"):  # two hashes say nothing
            differing[i] = f"{field.removesuffix('.rows')}: its images or captions are others now"
    if differing:
        raise RunError(
            f"The run in {saved.folder.parent.parent} was started differently: {'; '.join(differing)}",
            "Put that back to go on with it, or train another: k5train run --new, or -o OTHER",
        )


def _without_paths(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, wherever its caches lie: their rows are compared."""
    train = without_removed(identity["train"])
    train["data"] = [{k: v for k, v in entry.items() if k != "cache"} for entry in train.get("data", ())]
    return {**identity, "train": train}


def may_change(saved: SavedState, train: Mapping[str, Any]) -> set[str]:
    """Fields of ``[train]`` that may be others than they were, with all below them.

    Args:
        train: the recipe as it is now.
    """
    free = set(FREE)
    if depends_on_the_last_step(train):
        free -= {"steps", "epochs"}
    if read_saved_plan(saved, train["deterministic"]):
        free = free - {"memory"} | {"memory.vram"}  # how much there is, and no longer what is made of it
    if not train["deterministic"]:
        free.add("deterministic")  # it goes on, and no longer to the bit
    return free


def depends_on_the_last_step(train: Mapping[str, Any]) -> bool:
    """A schedule or a ramp that ends with the last step was another one all along if that step moves."""
    return bool(
        train["optim"]["lr_scheduler"] != "constant" or (train["tread"]["routes"] and train["tread"]["ramp_down"])
    )


def _rows(cache: Any) -> str:
    """One hash of which latents and captions the rows have, in their order."""
    columns = cache.columns("latent_key", "caption_keys", "mask_key")
    digest = hashlib.sha256()
    for column in columns.columns:
        digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:32]
