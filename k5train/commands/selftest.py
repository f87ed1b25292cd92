"""``k5train selftest``: compare this machine's training with diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.shared import console
from k5train.commands.arguments import Model, Recipe, Set, model_of_cache, read_recipe


def selftest(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Check on this machine that what is trained is what diffusers computes. Exit code 1 if it is not.

    Compares one step, its gradients and a picture from our transformer with those from diffusers' own. With --model and
    no cache it uses random rows; with neither, a toy model. Loads no text encoder.
    """
    from contextlib import ExitStack

    from k5cache.shared.checkpoint import model_folder
    from k5cache.shared.comparison import print_comparisons
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.selftest_model import only_cache, toy_model
    from k5cache.store.reader import open_cache

    root = cache or (None if model else only_cache())
    model_config, config = read_recipe(recipe, model, options)
    is_named = model_config is not None
    with ExitStack() as stack:
        opened = open_cache(root) if root else None
        if not model_config:
            model_config = model_of_cache(root) if root else ModelConfig(path=str(stack.enter_context(toy_model())))
        folder = model_folder(model_config, ("transformer", "vae", "scheduler"))
        from k5train.exact.selftest import selftest as run  # torch is imported here, which takes seconds
        from k5train.training.device import pick_device

        with console.working("comparing with diffusers"):
            comparisons = run(opened, folder, config, pick_device(config.device, folder))
    if as_json:
        console.print_json(comparisons)
        is_passed = not any(comparison.is_failed for comparison in comparisons)
    else:
        tested = root or model or (model_config.source if is_named else "a toy model")
        is_passed = print_comparisons(f"Selftest of {tested}", comparisons)
    if not is_passed:
        raise typer.Exit(1)
