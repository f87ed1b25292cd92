"""The command line of stage 1. Registers the commands, nothing else."""

from __future__ import annotations

import typer

from k5cache.commands import bench, encode, gc, info, merge, options, prompts, selftest, show, verify
from k5cache.shared import console

app = typer.Typer(
    cls=console.Commands,
    help="Encode images and captions once, for as many Kandinsky 5 LoRAs as you like.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.command()(encode.encode)
app.command()(encode.plan)
app.command()(encode.diff)
app.command()(info.info)
app.command()(verify.verify)
app.command()(show.show)
app.command()(gc.gc)
app.command()(merge.merge)
app.command()(selftest.selftest)
app.command()(options.options)
app.command()(bench.bench)
app.add_typer(prompts.prompts, name="prompts")


def main() -> None:
    """Run the command that was typed."""
    console.run(app)
