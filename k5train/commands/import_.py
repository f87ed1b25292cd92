"""``k5train import``: another trainer's setup as a recipe, and what became of each of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from k5cache.shared import console
from k5cache.shared.foreign import shown
from k5cache.shared.units import count_of

if TYPE_CHECKING:
    from k5train.moving.target import Moved


def import_(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="SimpleTuner's config.json, .toml or .env; kohya's .toml, or a file with its command line; "
            "ai-toolkit's .yaml.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="SimpleTuner's multidatabackend.json or kohya's dataset config, if FILE names none."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Validation prompts: SimpleTuner's user_prompt_library.json.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path("imported.toml"),
    trainer: Annotated[
        Literal["simpletuner", "kohya", "ai-toolkit"] | None,
        typer.Option("--from", help="Whose config it is, if its content does not tell."),
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Turn a setup of SimpleTuner, kohya, musubi-tuner or ai-toolkit into a recipe for both stages.

    Says of every key what it is here, or why it is not needed or not supported. Loads no model and changes no file of
    the other trainer. Credentials are neither shown nor written.
    """
    from k5cache.options import CacheConfig
    from k5cache.shared.files import make_folder, write_whole
    from k5cache.shared.model import ModelConfig
    from k5train.moving.move import move
    from k5train.moving.target import check_target
    from k5train.options.train import TrainConfig

    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    result = move(config, data, prompts, trainer, out, schemas)
    target = check_target(out, result.text)
    make_folder(target.parent)
    write_whole(target, lambda path: path.write_text(result.text, encoding="utf-8", newline="\n"))
    if is_json:
        console.print_json({"recipe": out, "trainer": result.trainer, "keys": result.rows, "defaults": result.defaults,
                            "commands": result.commands})  # fmt: skip
        return
    _print(result)
    console.out.print(f"Wrote {out}", markup=False)
    for first, command in zip(("Next, encode", *("and" for _ in result.commands)), result.commands[:-1], strict=False):
        console.next_step(first, command)
    console.next_step("then train", result.commands[-1])


_WIDTHS = (len("gradient_accumulation_steps"), 16, len("train.gradient_accumulation_steps"))


def _print(result: Moved) -> None:
    for where in dict.fromkeys(row.where for row in result.rows):
        table = console.table(where, "key", "there", "here")
        # At 80 columns the names of options stay whole, to be copied: fewer would be cut within a word.
        table.columns[0].min_width, table.columns[1].max_width, table.columns[2].min_width = _WIDTHS
        for row in result.rows:
            if row.where == where:
                is_lost = row.outcome in ("not supported", "unknown")
                here = Text.assemble((f"{row.outcome}: ", "yellow" if is_lost else "dim"), row.text)
                table.add_row(Text(row.key), Text(shown(row.value, 30)), here)
        console.out.print(table)
    counts = {name: sum(row.outcome == name for row in result.rows)
              for name in ("taken over", "not needed", "not supported", "unknown")}  # fmt: skip
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.out.print(f"Of {count_of(len(result.rows), 'key')} of {result.trainer}: {said}", markup=False)
    if result.defaults:
        named = ", ".join(f"{option} = {value}" for option, value in result.defaults.items())
        console.note(f"Not set there, so these are the defaults here: {named}")
