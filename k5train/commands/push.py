"""``k5train push``: a run's LoRA to the hub, with its page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5train.commands.arguments import RunPath

if TYPE_CHECKING:
    from k5train.publish.push import Parcel, Pushed


def push(
    run: RunPath,
    repo: Annotated[
        str | None, typer.Argument(help="owner/name, or a name alone for yours. Default: the name of the run.")
    ] = None,
    which: Annotated[str, typer.Option("--which", help="final, best, ema or a step.")] = "final",
    public: Annotated[bool, typer.Option("--public", help="Let everybody load it.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The hub repository of the base, if the run's model is a folder.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="For the page, for example mit. Default: none is named.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the page and the files, and send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Send a run's LoRA to the hub, private, with a page that has its pictures, trigger and settings.

    Log in first with `hf auth login`, or set HF_TOKEN. What is there already is not sent again.
    """
    from k5cache.shared.upload import full_name
    from k5train.publish.push import default_name, wrap
    from k5train.publish.push import push as push_parcel
    from k5train.runs.folder import open_run

    name = repo or default_name(run)
    open_run(run)  # what is not a run is refused before the hub is asked who the user is
    parcel = wrap(run, f"OWNER/{name}" if dry_run and "/" not in name else full_name(name), which, base_model, license_)
    if not parcel.base_model:
        console.note("The page names no base model, because the run's model is a folder: add --base-model REPO")
    if dry_run:
        print_parcel(parcel)
        return
    with console.progress() as bars:
        task = bars.add_task("sending", total=None, unit="byte", note="")

        def advance(what: str, num_bytes: int, total: int) -> None:
            bars.update(task, total=total, advance=num_bytes)

        pushed = push_parcel(parcel, public, advance)
    if as_json:
        console.print_json(pushed)
    else:
        print_pushed(pushed, parcel)


def print_parcel(parcel: Parcel) -> None:
    """The page, and what else would be sent."""
    from k5cache.shared.upload import num_bytes

    console.out.print(parcel.page, markup=False)
    table = console.table(f"Would be sent to {parcel.repo}", "file", "size", numbers=("size",))
    for name, content in parcel.files.items():
        table.add_row(name, console.human_bytes(num_bytes(content)))
    console.out.print(table)


def print_pushed(pushed: Pushed, parcel: Parcel) -> None:
    """What was sent, and who can see it."""
    table = console.table(f"Pushed {pushed.lora}", "what", "value")
    table.add_row("to", pushed.url)
    table.add_row("visible", "to everybody" if pushed.is_public else "only to you and who you let in")
    table.add_row("files sent", f"{len(pushed.files)}, {console.human_bytes(pushed.num_bytes)}")
    table.add_row("files that were there", str(pushed.num_there))
    if pushed.has_own_page:
        table.add_row("page", "your own, which stays")
    console.out.print(table)
    console.out.print(f"Loads by {parcel.call}", markup=False)
