"""``k5cache push`` and ``pull``: a cache to the hub, and from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.commands.arguments import CachePath, Json, Wait, suggest_training
from k5cache.shared import console
from k5cache.shared.errors import StoreError
from k5cache.shared.urls import is_url

if TYPE_CHECKING:
    from rich.progress import Progress

    from k5cache.upkeep.pull import Pulled
    from k5cache.upkeep.push import Pushed

Repository = Annotated[
    str,
    typer.Argument(
        help="A dataset of the hub: owner/name; for push, a name alone is yours. Or a URL: s3://bucket/cats."
    ),
]


def push(
    cache: CachePath,
    repo: Repository,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody load it. Images can be decoded from a cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a cache to the hub, as a private dataset. What is there already is not sent again.

    Log in first with `hf auth login`, or set HF_TOKEN. Every byte is checked before anything is sent. To a URL such as
    s3://bucket/cats it goes with the store's own credentials, and the bucket's policy decides who can see it.
    """
    from k5cache.upkeep.at_url import send_cache
    from k5cache.upkeep.push import push_cache

    with console.progress() as bars:
        if is_url(repo):
            _refuse(repo, "--public", public)
            pushed = send_cache(cache, Path(repo), _advance(bars))
        else:
            pushed = push_cache(cache, repo, public, _advance(bars))
    if as_json:
        console.print_json(pushed)
        return
    print_pushed(pushed, cache)
    console.next_step("Next, on another machine", console.command("k5cache", "pull", pushed.repo))


def pull(
    repo: Repository,
    cache: Annotated[Path | None, typer.Argument(help="The folder to make. Default: cache/<name of REPO>.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the dataset.")] = None,
    wait: Wait = 0,
    as_json: Json = False,
) -> None:
    """Fetch a cache from the hub. An interrupted pull goes on, and an earlier state is brought up to date."""
    from k5cache.store.manifest import read_manifest
    from k5cache.upkeep.at_url import fetch_cache
    from k5cache.upkeep.pull import pull_cache

    root = cache or Path("cache") / repo.rstrip("/").rpartition("/")[2]
    with console.progress() as bars:
        if is_url(repo):
            _refuse(repo, "--revision", revision)
            pulled = fetch_cache(Path(repo), root, wait, _advance(bars))
        else:
            pulled = pull_cache(repo, root, revision, wait, _advance(bars))
    if as_json:
        console.print_json(pulled)
        return
    print_pulled(pulled)
    suggest_training(root, read_manifest(root))


def _refuse(url: str, option: str, value: object) -> None:
    """Refuse an option of the hub for a URL.

    Raises:
        StoreError: it was given.
    """
    if value:
        raise StoreError(f"{option} is for the hub, and {url} is in an object store", f"Leave {option} out")


def _advance(bars: Progress) -> Callable[[str, int, int], None]:
    """What shows progress: one bar for each thing that is done."""
    tasks = {}

    def advance(what: str, num_bytes: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, unit="byte", note="")
        bars.advance(tasks[what], num_bytes)

    return advance


def print_pushed(pushed: Pushed, root: Path) -> None:
    """What was sent, and who can see it."""
    table = console.table(f"Pushed {root}", "what", "value", numbers=("value",))
    table.add_row("to", pushed.url)
    if pushed.url.startswith("http"):  # in an object store the bucket's policy decides
        table.add_row("visible", "to everybody" if pushed.is_public else "only to you and who you let in")
    table.add_row("items", str(pushed.num_items))
    table.add_row("files sent", f"{pushed.num_files}, {console.human_bytes(pushed.num_bytes)}")
    table.add_row("files that were there", str(pushed.num_there))
    if pushed.deleted:
        table.add_row("files of an earlier state removed", str(len(pushed.deleted)))
    console.out.print(table)


def print_pulled(pulled: Pulled) -> None:
    """What was fetched."""
    table = console.table(f"Pulled {pulled.repo}", "what", "value", numbers=("value",))
    table.add_row("to", str(pulled.root))
    if pulled.commit:
        table.add_row("commit", pulled.commit[:8])
    table.add_row("items", str(pulled.num_items))
    fetched = "nothing: it is up to date" if pulled.is_unchanged else console.human_bytes(pulled.num_bytes)
    table.add_row("fetched", fetched)
    table.add_row("files that were here", str(pulled.num_here))
    console.out.print(table)
