"""``k5cache selftest``: compare what this machine would cache with diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.commands.arguments import Device, Json, Model, Sources, model_of_cache
from k5cache.shared import console


def selftest(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Where its images are. Default: datasets/<name of CACHE>.")
    ] = None,
    sources: Sources = None,
    model: Model = None,
    count: Annotated[int, typer.Option(help="Number of rows of the cache to compare.", min=1)] = 4,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Prove on this machine that what is cached is what diffusers computes. Exits with code 1 if it is not.

    A few captions and images go through our encoders and through diffusers' own pipeline. With --model and no cache,
    these are captions and pictures of our own; with neither, they go through a toy model.
    """
    from contextlib import ExitStack

    from k5cache.exact.selftest import compare_with_diffusers
    from k5cache.shared.comparison import print_comparisons
    from k5cache.shared.device import pick_device
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.selftest_model import only_cache, toy_model
    from k5cache.store.reader import open_cache

    root = cache or (None if model else only_cache())
    with ExitStack() as stack:
        opened = open_cache(root) if root else None
        if opened:
            model_config = model_of_cache(opened.root, opened.manifest, model)
        else:
            model_config = ModelConfig(path=model or str(stack.enter_context(toy_model())))
        bars = stack.enter_context(console.progress())
        comparisons = compare_with_diffusers(opened, model_config, source, count, pick_device(device), bars, sources)
    if as_json:
        console.print_json(comparisons)
        has_failed = any(comparison.is_failed for comparison in comparisons)
    else:
        has_failed = not print_comparisons(f"Selftest of {root or model or 'a toy model'}", comparisons)
    if has_failed:
        raise typer.Exit(1)
