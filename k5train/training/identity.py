"""What may change between a run and its resumption, and is a resumed run still the same run?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from k5cache.shared.errors import RunError
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.recipe import to_dict
from k5train.options.data import DataConfig
from k5train.options.removed import without_removed
from k5train.options.train import TrainConfig
from k5train.planning.saved_plan import read_saved_plan
from k5train.runs.differences import differences
from k5train.runs.resume_state import SavedState

if TYPE_CHECKING:
    from k5train.data.mixture import Mixture

SPLIT_RULE = "over all caches"  # only of runs of several caches: one cache is split in the same way by every version
# The options of [train] that may change when a run is resumed. None of them changes the numbers of a step, except that
# another memory plan rounds differently. ``may_change`` has the exceptions.
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
    *(f"validation.{name}" for name in ("prompts", "prompt_names", "negative_prompt", "every", "guidance_scale",
      "num_inference_steps", "width", "height", "seed", "before", "held_out_every", "patience", "edits", "pairs",
      "probe_images")),
)  # fmt: skip


def identity(data: Mixture, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """What must stay the same for a run to go on: its recipe, the rows of its caches, and the weights of the base."""
    caches = {}
    for number, source in enumerate(data.sources):
        manifest = source.cache.manifest
        caches[f"cache{number or ''}"] = {
            "images": len(source.cache),
            "rows": _rows(source.cache),
            "recipe": manifest.recipe,
        }
    rule = {"split": SPLIT_RULE} if config.validation.split and len(data.sources) > 1 else {}
    return {"train": to_dict(config), **caches, **rule, "transformer": fingerprint(folder, "transformer")}


def check_same(saved: SavedState, now: Mapping[str, Any]) -> None:
    """Refuse to resume if anything has changed that changes the numbers.

    Raises:
        RunError: something has changed; names every field that differs.
    """
    before, now = _without_paths(saved.facts["identity"]), _without_paths(now)
    if _has_another_split(before, now):
        raise RunError(
            f"The run in {saved.folder.parent.parent} was started by an earlier version, which held images out of its"
            " first cache only. Now they are held out of every cache, so it would go on with other images",
            "Start another run: k5train run --new, or -o OTHER. The LoRAs of this one stay",
        )
    free = [f"train.{name}" for name in may_change(saved, now["train"])]
    free.append("split")
    # A later encode may fill the revision in. The weights that it names are compared by their fingerprints.
    free += [f"{name}.recipe.model.revision" for name in now if name.startswith("cache")]
    different = differences(before, dict(now), free)
    for i, (field, _, _) in enumerate(line.partition(": ") for line in different):
        if field.endswith(".rows"):  # to a reader the two hashes say nothing
            different[i] = f"{field.removesuffix('.rows')}: its images or captions have changed since the run started"
    if different:
        raise RunError(
            f"The run in {saved.folder.parent.parent} was started differently: {'; '.join(different)}",
            "Change that back to resume the run, or start another one: k5train run --new, or -o OTHER",
        )


def is_made_by(metadata: Mapping[str, str], now: Mapping[str, Any]) -> bool:
    """Whether the header of a LoRA, which has no checksum in its run, is that of a run, at whichever step.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not the header that a run writes.
    """
    before = _without_paths({"train": json.loads(metadata["k5.recipe"])})
    caches = [{"images": c["images"], "rows": c["rows"]} for name, c in now.items() if name.startswith("cache")]
    free = [f"train.{name}" for name in (*FREE, "deterministic")]
    return (
        metadata["k5.base_fingerprint"] == now["transformer"]
        and json.loads(metadata["k5.caches"]) == caches
        and not differences(before["train"], _without_paths(now)["train"], free, "train")
    )


def _has_another_split(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the same caches and share were split by another rule. A run that differs in those is refused for them."""
    caches_before, caches_now = ([name for name in i if name.startswith("cache")] for i in (before, now))
    shares = {i["train"]["validation"]["split"] for i in (before, now)}
    are_same = caches_before == caches_now and len(shares) == 1
    return are_same and before.get("split") != now.get("split")


def _without_paths(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the paths of the caches, which may move, and of the LoRA that was started from only the name.
    The rows of caches are compared.

    An option that the run's version did not know has its default: that is what the run did.
    """
    train = _with_defaults(without_removed(identity["train"]), to_dict(TrainConfig()))
    entry = to_dict(DataConfig(cache=""))
    train["data"] = [{k: v for k, v in {**entry, **given}.items() if k != "cache"} for given in train.get("data", ())]
    if start := train["lora"].get("init_lora"):
        train["lora"] = {**train["lora"], "init_lora": PurePath(start).name}
    return {**identity, "train": train}


def _with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values, and the defaults of those that are not there, in tables at every depth."""
    tables = {k: _with_defaults(v, defaults[k]) for k, v in values.items() if isinstance(v, Mapping) and k in defaults}
    return {**defaults, **values, **tables}


def may_change(saved: SavedState, train: Mapping[str, Any]) -> set[str]:
    """Fields of ``[train]`` that may differ from what they were, with everything below them.

    Args:
        train: the recipe now.
    """
    free = set(FREE)
    if depends_on_the_last_step(train):
        free -= {"steps", "epochs"}
    if read_saved_plan(saved, train["deterministic"]):
        free = free - {"memory"} | {"memory.vram"}  # the budget may change, the plan may not
    if not train["deterministic"]:
        free.add("deterministic")  # a deterministic run may go on without being exact
    return free


def depends_on_the_last_step(train: Mapping[str, Any]) -> bool:
    """Whether the number of steps shapes the whole run.

    A decaying schedule or a ramp is scaled to it, so that another number would change the steps already done.
    """
    return bool(
        train["optim"]["lr_scheduler"] != "constant" or (train["tread"]["routes"] and train["tread"]["ramp_down"])
    )


def _rows(cache: Any) -> str:
    """A hash of the latents, captions, masks and sources that the rows have, in their order."""
    of_sources = ("source_key", "empty_key") if cache.kind == "i2i" else ()
    columns = cache.columns("latent_key", "caption_keys", "mask_key", *of_sources)
    digest = hashlib.sha256()
    for column in columns.columns:
        digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:32]
