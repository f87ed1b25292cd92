"""Which cache does a repository of the hub hold? Its manifest alone is fetched."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from k5cache.shared import hub
from k5cache.shared.errors import CacheError, HubError
from k5cache.store import files
from k5cache.store.manifest import Manifest, read_manifest
from k5cache.store.ours import FILE


def remote_manifest(repo: str, commit: str | None) -> tuple[bytes, Manifest]:
    """The manifest of a cache on the hub, with its bytes.

    Raises:
        HubError: what is there is not a cache that this version reads.
    """
    with tempfile.TemporaryDirectory(prefix="k5-") as folder:
        hub.api().hf_hub_download(repo, FILE, repo_type="dataset", revision=commit, local_dir=folder)
        try:
            return manifest_with_bytes(Path(folder))
        except CacheError as error:
            raise HubError(f"{repo}: {error.problem.replace(folder, repo)}", "Name a cache that was pushed") from None


def manifest_with_bytes(root: Path) -> tuple[bytes, Manifest]:
    """A manifest and its bytes. If another process replaces it meanwhile, they are read again."""
    while True:
        manifest = read_manifest(root)
        with os.fdopen(files.open_inside(root, FILE), "rb") as file:
            raw = file.read()
        if read_manifest(root) == manifest:
            return raw, manifest
