"""How does a cache get to the hub? As a dataset: checked first, its manifest last, nothing sent twice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared import hub, upload
from k5cache.shared.command_line import command
from k5cache.shared.console import human_bytes, note
from k5cache.shared.errors import CacheCorrupt, CacheError, HubError
from k5cache.shared.kind import LONG_NAMES
from k5cache.shared.model import FLAVOURS
from k5cache.shared.units import count_of
from k5cache.store import files
from k5cache.store.manifest import Manifest
from k5cache.store.ours import FILE, SHARD_FILE, TABLE_FILE
from k5cache.upkeep.finished import finished_index
from k5cache.upkeep.remote import manifest_with_bytes, remote_manifest

PAGE = "README.md"
MARK = "<!-- Written by `k5cache push`, which replaces this page. Remove this line to keep your own. -->"
_MOST_PAGE = 1 << 20


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    repo: str
    url: str
    is_public: bool
    num_items: int
    num_files: int
    """That were sent."""
    num_bytes: int
    """That were sent."""
    num_there: int
    """Files that the repository had already."""
    deleted: tuple[str, ...]
    """Files of the cache as it was before, which are not in it any more."""


def push_cache(
    root: Path, repo: str, is_public: bool = False, advance: Callable[[str, int, int], None] = lambda *numbers: None
) -> Pushed:
    """Send a cache to a dataset repository of one's own, which is made if there is none.

    Shards and tables go first and the manifest last, so that whoever pulls meanwhile gets the cache as it was before.

    Args:
        repo: ``owner/name``, or a name alone for one's own.
        advance: called with what is being done, the bytes that were read or sent, and of how many.

    Raises:
        CacheCorrupt: a byte of the cache is not the byte that was written.
        CacheError: it is not finished, or changed meanwhile.
        HubError: the hub refuses, or the repository holds something else.
    """
    raw, manifest = manifest_with_bytes(root)
    index = finished_index(root, manifest)
    repo = upload.full_name(repo)
    with hub.answering(f"push {root} to {repo}"):
        destination = upload.look_at(repo, "dataset", is_public)
        _check_contents(destination, manifest, root)
        from k5cache.upkeep.verify import verify_cache  # with torch: what the hub refuses is said before

        total = sum(shard.num_bytes for shard in manifest.shards)
        verified = verify_cache(root, lambda read: advance("verifying", read, total))
        if verified.problems:
            raise CacheCorrupt(
                f"{root} is damaged and is not pushed: {verified.problems[0]}",
                f"See all of it with {command('k5cache', 'verify', root)}, and mend it: {files.repair(root)}",
            )
        named: dict[str, upload.Content] = {name: root / name for name in sorted(manifest.named)}
        to_send = upload.absent(destination, named)
        last = upload.absent(destination, {FILE: raw, **_page(destination, manifest, repo)})
        size = sum(map(upload.num_bytes, to_send.values()))
        deleted = tuple(sorted(name for name in destination.names - manifest.named if _is_ours(name)))
        if to_send or last or deleted:
            destination = upload.make(destination)
        if to_send:
            there = sum(upload.num_bytes(content) for content in named.values()) - size
            advance("sending", 0, size)
            note(f"Sending {human_bytes(size)} to {repo}" + (f", {human_bytes(there)} is there" if there else ""))
        try:
            if to_send:
                title = f"Rows of {count_of(index.num_rows, 'item')}"
                upload.send(destination, to_send, title, advance=lambda sent: advance("sending", sent, size))
            if last or deleted:
                upload.send(destination, last, f"A cache of {count_of(index.num_rows, 'item')}", deleted)
        except FileNotFoundError as error:
            raise CacheError(f"{root} changed while it was pushed: {error.filename} is gone", "Push it again") from None
    num_there = len(named) - len(to_send)
    num_bytes = size + sum(map(upload.num_bytes, last.values()))
    count = len(to_send) + len(last)
    return Pushed(repo, destination.url, destination.is_public, index.num_rows, count, num_bytes, num_there, deleted)


def _is_ours(name: str) -> bool:
    return bool(SHARD_FILE.fullmatch(name) or TABLE_FILE.fullmatch(name))


def _check_contents(destination: upload.Destination, manifest: Manifest, root: Path) -> None:
    """Refuse a repository that holds something else.

    Raises:
        HubError: says what.
    """
    another = f"Name another repository: {command('k5cache', 'push', root, 'OTHER')}"
    others = sorted(name for name in destination.names if not _is_ours(name) and name not in (FILE, PAGE))
    if FILE not in destination.names:
        if others:
            raise HubError(f"{destination.repo} holds other files and no cache: {', '.join(others[:3])}", another)
        return
    _, theirs = remote_manifest(destination.repo, None)
    if theirs.shards and not {shard.file for shard in theirs.shards} & {shard.file for shard in manifest.shards}:
        raise HubError(f"{destination.repo} holds another cache, with none of the shards of {root}", another)


def _page(destination: upload.Destination, manifest: Manifest, repo: str) -> dict[str, upload.Content]:
    """The repository's page, unless its owner has written one."""
    if PAGE in destination.names:
        with tempfile.TemporaryDirectory(prefix="k5-") as folder:
            path = hub.api().hf_hub_download(repo, PAGE, repo_type="dataset", local_dir=folder)
            with Path(path).open("rb") as file:
                if MARK.encode() not in file.read(_MOST_PAGE):
                    return {}
    return {PAGE: page(manifest, repo).encode()}


def page(manifest: Manifest, repo: str) -> str:
    """What the repository's page says of a cache."""
    source = str(manifest.recipe.get("model", {}).get("source", ""))
    model = f"`{source}`" if source in FLAVOURS.values() else "a model that is not published under its own name"
    buckets = sorted({shard.bucket for shard in manifest.shards if shard.bucket})
    name = repo.partition("/")[2]
    return f"""---
pretty_name: {name}
tags:
- kandinsky5-lora
viewer: false
---
{MARK}

# {name}

A cache of latents and text embeddings, from which LoRAs for Kandinsky 5.0 Image are trained without its encoders.

| what | value |
|---|---|
| for | {LONG_NAMES[manifest.kind]} |
| encoded by | {model} |
| items | {manifest.index.num_rows if manifest.index else 0} |
| sizes | {", ".join(f"{width}x{height}" for width, height in buckets)} |
| bytes | {human_bytes(sum(shard.num_bytes for shard in manifest.shards))} |

It holds captions, names of files, and latents, from which the images can be decoded.

```
k5cache pull {repo}
k5train run cache/{name}
```
"""
