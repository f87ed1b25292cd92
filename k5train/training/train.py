"""One run, from the checks before anything is loaded to its result. The checks need no torch: they are made at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from k5cache.shared.device import check_name
from k5train.adapter.header import check_kind
from k5train.data.compatible import check_manifest, check_widths
from k5train.data.kind import check_classes, check_masks, check_options
from k5train.data.mixture import Mixture
from k5train.data.split import split_off
from k5train.options.precision import with_precision
from k5train.options.rate import with_usual_rate
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks
from k5train.runs import requests
from k5train.runs.folder import Run, lock_run, remove_leftovers
from k5train.runs.metrics import check_metrics
from k5train.runs.resume_state import latest_state
from k5train.runs.trackers import check_trackers
from k5train.runs.written import check_recorded
from k5train.training.identity import check_same, identity
from k5train.training.overwriting import check_overwrites
from k5train.training.result import Result
from k5train.training.shared_out import as_one, check_alike, order_of, seen, shared_out

if TYPE_CHECKING:
    from k5train.training.base import Base


def train(
    data: Mixture, folder: Path, config: TrainConfig, run: Run, base: Base | None = None,
    accepted: Callable[[], object] | None = None, step: int | None = None, always_probe: bool = False,
    ranks: Ranks = ALONE,
) -> Result:  # fmt: skip
    """Train one LoRA. A run with a saved state goes on from there.

    Args:
        config: a precision that is still ``auto`` is ``int8-quanto``; ``start`` and a sweep decide it before.
        folder: the checkpoint. Only ``transformer`` is read, and ``scheduler`` and ``vae`` for pictures.
        base: the loaded transformer that several runs share. It is returned to its state without an adapter.
        accepted: called before the first step, when nothing more can be refused.
        step: go on from the state of this step, and remove those after it. None: from the newest.
        always_probe: measure the loss on some images that are trained on, before the first step and after the last,
            also without a split. A run that measured it before the first step goes on to do so.
        ranks: the processes that train it together, of which this is the first. The others ``follow``.

    Raises:
        CacheStale: the cache does not fit the transformer.
        RecipeError: an option belongs to the other kind of model.
        DoesNotFit: no plan fits, which is found before anything is loaded; or VRAM ran out all the same, and the LoRA
            is saved.
        RunError: there is no GPU for a full-size model, the loss is not finite, the run was started differently, its
            saved state is damaged or was removed, or a LoRA would be overwritten that the run did not make.
        KeyboardInterrupt: Ctrl-C. The state is saved.
    """
    called, config = time.monotonic(), with_precision(with_usual_rate(config), "int8-quanto")
    check_recipe(data, folder, config)
    data = split_off(data, config.validation.split)
    with lock_run(run), requests.dropped(run):
        remove_leftovers(run)
        saved = latest_state(run.state, step)
        config = shared_out(config, run, saved, ranks.size)
        run_identity = identity(data, folder, as_one(config, ranks.size))
        if saved:
            check_same(saved, run_identity)
            saved.check()
            check_metrics(run.metrics, saved.progress.metrics)
        else:
            check_start(config)
        check_overwrites(run, saved, data, config, run_identity)
        check_widths(data.first, folder)  # imports torch, as every line from here on
        if ranks.size > 1:
            caches = [source.cache.root for source in data.sources]
            ranks.agree(order_of(run, folder, config, caches, saved.progress.step if saved else None))
            check_alike(ranks, seen(run_identity, saved))
        from k5train.training.carry_out import carry_out

        result = carry_out(data, folder, config, run, run_identity, saved, called, base, accepted, always_probe, ranks)
        assert result is not None, "the first process has the result"
        return result


def check_recipe(data: Mixture, folder: Path, config: TrainConfig) -> None:
    """Refuse a recipe that does not fit its caches or the model. Imports no torch.

    Raises:
        CacheStale, RecipeError, K5Error: as ``train``.
    """
    check_name(config.device, "train.device=")
    check_manifest(data.first, folder)
    check_options(data, config)
    check_masks(data, config)
    check_classes(data, config)
    check_trackers(config.trackers)


def check_start(config: TrainConfig) -> None:
    """Refuse a LoRA that a new run cannot start from, as far as its file tells without torch."""
    if config.lora.init_lora:
        if (start := Path(config.lora.init_lora)).is_file():
            check_recorded(start)
        check_kind(start)
