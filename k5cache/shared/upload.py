"""How is a repository of one's own on the hub made and filled? Private unless asked otherwise; nothing is sent twice.

Files go up in batches, each with its own commit: what an interrupted upload has committed is not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from k5cache.shared import hub
from k5cache.shared.errors import HubError
from k5cache.shared.sealed import Digest

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

RepoKind = Literal["model", "dataset"]
Content = Path | bytes
_BATCH_FILES = 100
_BATCH_BYTES = 1 << 30
_GITS_OWN = frozenset({".gitattributes"})


@dataclass(frozen=True)
class Destination:
    """A repository to fill."""

    repo: str
    """``owner/name``."""
    kind: RepoKind
    is_public: bool
    files: Mapping[str, str]
    """What it has: name -> the sha256 of a large file, git's hash of a small one."""
    is_new: bool = False

    @property
    def names(self) -> set[str]:
        """Its files, without those that every new repository has."""
        return set(self.files) - _GITS_OWN

    @property
    def url(self) -> str:
        """Of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


def full_name(repo: str) -> str:
    """``owner/name``; a name alone is one of the user who is logged in.

    Raises:
        HubError: it is no name of a repository, or nobody is logged in.
    """
    name = repo
    if "/" not in repo:
        with hub.answering("ask the hub who you are"):
            name = f"{hub.api().whoami()['name']}/{repo}"
    if not hub.REPOSITORY.fullmatch(name):
        raise HubError(
            f"{repo} is not a name of a repository",
            "Write it as owner/name, with letters, digits, dots, - and _ alone",
        )
    return name


def look_at(repo: str, kind: RepoKind, is_public: bool) -> Destination:
    """What a repository has. Nothing is made: ``make`` does that.

    Args:
        is_public: whether the user asked for a public repository.

    Raises:
        HubError: it is public already, and the user did not ask for that.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api = hub.api()
        ask: Callable[..., ModelInfo | DatasetInfo] = api.dataset_info if kind == "dataset" else api.model_info
        info = ask(repo, timeout=10, files_metadata=True)
    except RepositoryNotFoundError:
        return Destination(repo, kind, is_public, {}, is_new=True)
    if not info.private and not is_public:
        raise HubError(
            f"{repo} is public: everybody could load what is pushed",
            "Push to another repository, make it private in its settings, or add --public",
        )
    hashes = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id or "" for f in info.siblings or ()}
    return Destination(repo, kind, not info.private, hashes)


def make(destination: Destination) -> Destination:
    """The repository, made if there is none."""
    if destination.is_new:
        api = hub.api()
        api.create_repo(destination.repo, repo_type=destination.kind, private=not destination.is_public, exist_ok=True)
    return replace(destination, is_new=False)


def absent(destination: Destination, files: Mapping[str, Content]) -> dict[str, Content]:
    """Those of ``files`` that the repository does not have, or has with other bytes."""
    return {name: content for name, content in files.items() if not _is_same(destination.files.get(name), content)}


def num_bytes(content: Content) -> int:
    """The size of what is to be sent."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def send(
    destination: Destination,
    files: Mapping[str, Content],
    message: str,
    deleted: Sequence[str] = (),
    advance: Callable[[int], None] = lambda sent: None,
) -> None:
    """Commit files, in batches.

    Args:
        deleted: files of the repository that the last commit removes.
        advance: called with the bytes of each batch that has been committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    batches = list(_batches(files)) or [{}]
    for number, batch in enumerate(batches, 1):
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in batch.items()
        ]
        if number == len(batches):
            operations += [CommitOperationDelete(name) for name in deleted]
        if operations:
            part = f" ({number} of {len(batches)})" if len(batches) > 1 else ""
            hub.api(quiet=True).create_commit(
                destination.repo, operations, commit_message=message + part, repo_type=destination.kind
            )
        advance(sum(map(num_bytes, batch.values())))


def _batches(files: Mapping[str, Content]) -> Iterator[dict[str, Content]]:
    batch: dict[str, Content] = {}
    size = 0
    for name, content in files.items():
        if batch and (len(batch) == _BATCH_FILES or size + num_bytes(content) > _BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[name] = content
        size += num_bytes(content)
    if batch:
        yield batch


def _is_same(known: str | None, content: Content) -> bool:
    if not known:
        return False
    if len(known) == 64:
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else Digest.of(content).sha256
        return known == digest
    data = content if isinstance(content, bytes) else content.read_bytes()
    return known == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
