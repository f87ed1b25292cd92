"""The command line of stage 1. Registers the commands, nothing else."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from k5cache.commands import bench, encode, gc, info, merge, options, prompts, push, selftest, show, verify
from k5cache.shared import console, help
from k5cache.shared.torchrun import refuse_torchrun

MAKE = "Make a cache"
LOOK = "Look into a cache"
CHANGE = "Change a cache"
HUB = "The hub"
MACHINE = "This machine"

app = typer.Typer(
    cls=console.Commands,
    help="Encode images and captions once, for as many Kandinsky 5 LoRAs as you like.",
    epilog=help.examples(
        "k5cache encode datasets/cats           # images to cache/cats",
        "k5train run cache/cats                 # the cache to a LoRA",
        "k5cache encode --help                  # options and more examples",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
add = partial(help.add, app)


@app.callback()
def k5cache(ctx: typer.Context, version: Annotated[bool, help.version_option("k5cache")] = False) -> None:
    """What is given before the command."""
    refuse_torchrun("k5cache", ctx.invoked_subcommand, shared=(), on_gpus=("encode",))


add(
    MAKE,
    encode.encode,
    "k5cache encode datasets/cats",
    "k5cache encode datasets/cats --recipe my.toml -o cache/cats",
    "k5cache encode datasets/cats --set cache.trigger=ohwx",
    "k5cache encode after --sources before --set model.flavour=i2i-lite-sft",
    'k5cache encode "tars/cats-*.tar" -o cache/cats',
)
add(MAKE, encode.plan, "k5cache plan datasets/cats", "k5cache plan datasets/cats --vram 8GB")
add(MAKE, encode.diff, "k5cache diff datasets/cats")
add(MAKE, options.options, "k5cache options > my.toml", "k5cache options crop")
add(LOOK, info.info, "k5cache info cache/cats", "k5cache info cache/cats --json")
add(LOOK, show.show, "k5cache show cache/cats", "k5cache show cache/cats --count 64 -o cats.png")
add(LOOK, verify.verify, "k5cache verify cache/cats", "k5cache verify cache/cats --reencode 8 --source datasets/cats")
app.add_typer(prompts.prompts, name="prompts", rich_help_panel=CHANGE)
add(CHANGE, merge.merge, "k5cache merge cache/cats cache/dogs -o cache/pets")
add(CHANGE, gc.gc, "k5cache gc cache/cats --dry-run", "k5cache gc cache/cats")
add(HUB, push.push, "k5cache push cache/cats cats", "k5cache push cache/cats owner/cats --public")
add(HUB, push.pull, "k5cache pull owner/cats", "k5cache pull owner/cats cache/my_cats")
add(MACHINE, selftest.selftest, "k5cache selftest", "k5cache selftest cache/cats --source datasets/cats")
add(MACHINE, bench.bench, "k5cache bench --store")


def main() -> None:
    """Run the command that was typed."""
    console.run(app)
