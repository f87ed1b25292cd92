"""``k5cache show``: what will be trained on, as pictures?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.commands.arguments import CachePath, Device, Model, model_of_cache
from k5cache.shared import console
from k5cache.shared.units import count_of


def show(
    cache: CachePath,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG. Default: <CACHE>.png beside the cache.")] = None,
    count: Annotated[int, typer.Option(help="Number of random items to show.", min=1, max=400)] = 16,
    model: Model = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Decides which items are drawn.")] = 0,
) -> None:
    """Draw a contact sheet of what will be trained on: decoded latents with bucket and caption."""
    from k5cache.shared.drawn import check_picture
    from k5cache.store.reader import open_cache
    from k5cache.upkeep.show import free_default, write_contact_sheet

    opened = open_cache(cache)
    path = out or free_default(cache)
    target = check_picture(path)
    with console.progress() as bars:
        model_config = model_of_cache(cache, opened.manifest, model)
        num_shown = write_contact_sheet(opened, target, count, model_config, device, bars, seed)
    console.out.print(f"Wrote {path}: {num_shown} of {count_of(len(opened), 'item')}", markup=False)
