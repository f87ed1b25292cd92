"""What does a dataset of the hub hold? The files of a split are downloaded, and read like local ones.

They lie in the hub's own cache, which keeps each version of a file once. If the hub cannot be reached, what was
downloaded before is used, and a note says so.
"""

from __future__ import annotations

import fnmatch
import glob
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared import hub, plain
from k5cache.shared.console import note
from k5cache.shared.errors import DatasetError
from k5cache.shared.kind import Kind
from k5cache.sources import folder as folders
from k5cache.sources.items import IMAGE_SUFFIXES, METADATA
from k5cache.sources.rows import is_text
from k5cache.sources.splits import CARDS, names_of_split, read_card, split_names
from k5cache.sources.table_columns import image_column, source_column
from k5cache.sources.tables import Table, load_named_files, load_splits, of_one_kind
from k5cache.sources.tars import Tar

_FIX = "Check the path or name, the network, and cache.split and cache.dataset_config"


def load_hub(name: str, config: CacheConfig, kind: Kind) -> Table:
    """Open a dataset on the hub.

    Raises:
        DatasetError: it cannot be reached, lacks the split or configuration, or is of a kind that cannot be read.
    """
    repository = _Repository(name)
    cards = [card for card in CARDS if card in repository.names]
    card = read_card(repository.fetch(cards)) if cards else None
    splits = {
        split: names_of_split(name, repository.names, card, replace(config, split=split))
        for split in split_names(config.split)
    }
    wanted = {split: of_one_kind(names) or _images(name, names) for split, names in splits.items()}
    root = repository.fetch([file for files in wanted.values() for file in files])
    files = {split: [root / file for file in of_split] for split, of_split in wanted.items()}
    if not any(of_one_kind(names) for names in splits.values()):
        return load_named_files(name, root, files, config)
    table = load_splits(name, root, files, config)
    if named := _named_images(table, config, kind, root, repository.names):
        repository.fetch(named)
    return table


class _Repository:
    """A dataset on the hub, at its newest commit; or as it was downloaded, if the hub cannot be reached."""

    def __init__(self, name: str) -> None:
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import RepositoryNotFoundError

        self._name = name
        self._downloaded: Path | None = None
        try:
            info = hub.api().dataset_info(name, timeout=10)
            self._commit = info.sha
            self.names = [file.rfilename for file in info.siblings or []]
            """Of all its files."""
        except hub.unreachable() as error:
            reason = hub.reason_of(error)
            snapshot = _snapshot(name)
            if snapshot is None or isinstance(error, RepositoryNotFoundError):
                raise DatasetError(
                    f"There is no file or folder {name}, and as a dataset of the hub it cannot be loaded: {reason}",
                    _fix(error),
                ) from None
            if not HF_HUB_OFFLINE:
                note(
                    f"Using the downloaded copy of {name} (commit {snapshot.name[:8]}): cannot reach the hub ({reason})"
                )
            self._downloaded = snapshot
            self.names = _names_of(snapshot)

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder with these files of it. Those that are here already are not downloaded again."""
        if self._downloaded is not None:
            missing = next((name for name in names if not (self._downloaded / name).is_file()), None)
            if missing is not None:
                raise DatasetError(
                    f"{self._name} is incomplete on this machine ({missing} is missing), and the hub cannot be reached",
                    "Check the network and try again; what is here already is not downloaded again",
                )
            return self._downloaded
        try:
            patterns = _patterns(names, self.names)
            folder = hub.api().snapshot_download(
                self._name, repo_type="dataset", revision=self._commit, allow_patterns=patterns
            )
            return Path(str(folder))
        except hub.unreachable() as error:
            raise DatasetError(f"{self._name} cannot be downloaded: {hub.reason_of(error)}", _fix(error)) from None


def _fix(error: Exception) -> str:
    return hub.fix_of(error) if hub.is_about_login(error) else _FIX


def _snapshot(name: str) -> Path | None:
    """What was downloaded last of a dataset."""
    snapshots = [path for path in (hub.home_of(name, "dataset") / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime_ns, default=None)


def _names_of(snapshot: Path) -> list[str]:
    """The names of all files that a commit has on the hub, as the hub's client noted them; else of those here."""
    note_of_client = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    try:
        return list(plain.read_json(note_of_client, 1 << 30)["files"])
    except (OSError, ValueError, KeyError, TypeError):  # an older client keeps none
        return [file.relative_to(snapshot).as_posix() for file in folders.files(snapshot)]


def _patterns(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """Patterns for ``snapshot_download``: one for all files of a folder and kind if all of them are wanted.

    It compares each file with each pattern, so a pattern for each of 10,000 images would take minutes.
    """
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        folder, base = posixpath.split(name)
        kinds.setdefault(glob.escape(posixpath.join(folder, "")) + "*" + posixpath.splitext(base)[1], []).append(name)
    all_names = list(names)
    patterns: list[str] = []
    for pattern, of_kind in kinds.items():
        is_all = len(of_kind) > 1 and set(fnmatch.filter(all_names, pattern)) <= set(wanted)
        patterns += [pattern] if is_all else [glob.escape(name) for name in of_kind]
    return patterns


def _named_images(table: Table, config: CacheConfig, kind: Kind, root: Path, names: Sequence[str]) -> list[str]:
    """The files of the repository that a table of file names means, relative to it or to the table."""
    if isinstance(table.pieces[0].rows, Tar):
        return []
    sources = source_column(table, config.source_column) if kind == "i2i" else None
    columns = [image_column(table, config.image_column, sources), *([sources] if sources else [])]
    of_names = [column for column in columns if is_text(table.schema.field(column).type)]
    cells = [cell for column in of_names for cell in table.column(column) if isinstance(cell, str)]
    folders_of_tables = {file.parent.relative_to(root).as_posix() for file in table.files} | {""}
    available = set(names)
    named = (posixpath.normpath(posixpath.join(base, cell)) for cell in cells for base in folders_of_tables)
    return [name for name in dict.fromkeys(named) if name in available]


def _images(name: str, names: Sequence[str]) -> list[str]:
    """The images and metadata files of a dataset without tables.

    Raises:
        DatasetError: it has none.
    """
    images = [
        file for file in names
        if posixpath.splitext(file)[1].lower() in IMAGE_SUFFIXES or posixpath.basename(file) in METADATA
    ]  # fmt: skip
    if not images:
        kinds = " ".join(sorted({posixpath.splitext(file)[1] for file in names}))
        raise DatasetError(
            f"{name} has neither tables nor tars nor images in this split, but {kinds or 'no files'}",
            f"Download it (hf download {name} --repo-type dataset --local-dir DIR), unpack it, and give the folder",
        )
    return images
