"""The command line of stage 2. Registers the commands, nothing else."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated

import typer

from k5cache.shared import console, help
from k5cache.shared.torchrun import refuse_torchrun
from k5train.commands import (
    base,
    bench,
    compare,
    configure,
    doctor,
    import_,
    lora,
    options,
    plan,
    push,
    recipes,
    report,
    run,
    sample,
    selftest,
    sweep,
    ui,
)

TRAIN = "Train"
LOOK = "Look at what was trained"
PREPARE = "Prepare a run"
FILES = "LoRA files"
MACHINE = "This machine"

app = typer.Typer(
    cls=console.Commands,
    help="Train a Kandinsky 5 Image LoRA from a cache, on the card you have.",
    epilog=help.examples(
        "k5train configure datasets/cats    # a few questions make a recipe",
        "k5cache encode datasets/cats       # then: images to a cache",
        "k5train run cache/cats             # then: the cache to a LoRA",
        "k5train run --help                 # options and more examples",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
add = partial(help.add, app)


@app.callback()
def k5train(ctx: typer.Context, version: Annotated[bool, help.version_option("k5train")] = False) -> None:
    """What is given before the command."""
    refuse_torchrun("k5train", ctx.invoked_subcommand, shared=("run", "resume"), on_gpus=("sweep",))


add(
    TRAIN,
    run.run,
    "k5train run cache/cats",
    "k5train run cache/cats --recipe my.toml -o runs/cats",
    "k5train run cache/cats --set train.lora.rank=16 --vram 12GB",
    "k5train run cache/cats cache/dogs",
)
add(TRAIN, run.resume, "k5train resume runs/cats", "k5train resume runs/cats --set train.steps=4000")
add(
    TRAIN,
    sweep.sweep,
    "k5train sweep cache/cats --grid train.lora.rank=8,16,32",
    "k5train sweep cache/cats --list rates.toml",
)
add(
    LOOK,
    sample.sample,
    "k5train sample runs/cats",
    'k5train sample runs/cats --prompt "a cat on a roof" --strength 0.7',
    "k5train sample runs/cats --which best --which final --measure",
)
add(
    LOOK,
    ui.ui,
    "k5train ui",
    "k5train ui --folder ~/loras --port 8010",
    "k5train ui --host 0.0.0.0    # other machines, with a token",
)
add(LOOK, report.report, "k5train report runs/cats", "k5train report runs/cats runs/cats-2 -o cats.html")
add(LOOK, compare.compare, "k5train compare runs/cats runs/cats-2", "k5train compare sweeps/cats -o cats.png")
add(
    PREPARE,
    configure.configure,
    "k5train configure datasets/cats",
    'k5train configure datasets/cats --goal character --trigger "ohwx cat" --yes',
    "k5train configure cats.toml     # again, from the answers of that recipe",
)
add(PREPARE, plan.plan, "k5train plan cache/cats", "k5train plan --vram 12GB --resolution 768")
add(
    PREPARE,
    recipes.recipes,
    "k5train recipes",
    "k5train recipes style-16gb -o my.toml",
)
add(PREPARE, options.options, "k5train options > my.toml", "k5train options rank memory")
add(
    PREPARE,
    import_.import_,
    "k5train import config/config.json",
    "k5train import dataset.toml --from kohya -o cats.toml",
    name="import",
)
add(FILES, lora.export, "k5train export runs/cats", "k5train export cats.safetensors --format kohya --dtype fp16")
add(
    FILES,
    lora.merge,
    "k5train merge runs/cats style.safetensors -w 1 -w 0.5 -o both.safetensors",
    "k5train merge runs/cats --into-base models/k5 -o models/k5-cats",
)
add(FILES, lora.check_lora, "k5train check-lora cats.safetensors", name="check-lora")
add(FILES, push.push, "k5train push runs/cats", "k5train push runs/cats owner/cats --which best --public")
add(MACHINE, doctor.doctor, "k5train doctor", "k5train doctor --vram 12GB --json")
app.add_typer(base.base, name="base", rich_help_panel=MACHINE)
add(MACHINE, selftest.selftest, "k5train selftest", "k5train selftest cache/cats")
add(MACHINE, bench.bench, "k5train bench --quick")


def main() -> None:
    """Run the command that was typed."""
    # With this, freed memory is joined again, so torch reserves what the plan says. torch reads it when it is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    console.run(app)
