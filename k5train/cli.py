"""The command line of stage 2. Registers the commands, nothing else."""

from __future__ import annotations

import os

import typer

from k5cache.shared import console
from k5train.commands import base, bench, compare, doctor, import_, lora, options, plan, run, sample, selftest, sweep

app = typer.Typer(
    cls=console.Commands,
    help="Train a Kandinsky 5 Image LoRA from a cache, on the card you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(run.run)
app.command()(run.resume)
app.command()(sweep.sweep)
app.command()(sample.sample)
app.command()(compare.compare)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(selftest.selftest)
app.command()(bench.bench)
app.command()(options.options)
app.command("import")(import_.import_)
app.command()(lora.export)
app.command()(lora.merge)
app.command("check-lora")(lora.check_lora)
app.add_typer(base.base, name="base")


def main() -> None:
    """Run the command that was typed."""
    # With this, freed memory is joined again, so torch reserves what the plan says. torch reads it when it is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    console.run(app)
