"""Where is a checkpoint? In a folder in the diffusers layout, or in a hub repository, of which only parts are fetched.

One short request asks the hub which commit a revision is. What is complete on this machine is not downloaded again. If
the hub cannot be reached, the downloaded copy is used, and a note says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k5cache.shared.console import note
from k5cache.shared.errors import ModelError
from k5cache.shared.model import ModelConfig

ENCODER_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
_CONFIG_OF = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}


def model_folder(model: ModelConfig, parts: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint, with ``parts`` (``transformer``, ``vae``, ...) in it.

    Raises:
        ModelError: there is no such folder or repository, the hub cannot be reached, or a part is missing.
    """
    source = model.source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if model.path and (source.startswith((".", "/", "~")) or source.count("/") != 1):
            raise ModelError(
                f"There is no model folder {source}", "Give a folder in the diffusers layout with --model DIR"
            )
        folder = _from_hub(source, model.revision, parts)
    for part in parts:
        config = folder / part / _CONFIG_OF.get(part, "config.json")
        if not config.is_file():
            raise ModelError(
                f"The model folder {folder} lacks {part}/{config.name}",
                "Give a complete Kandinsky 5 Image repository in the diffusers layout with --model DIR",
            )
    return folder


def folder_on_disk(model: ModelConfig, parts: tuple[str, ...]) -> Path | None:
    """The folder as it is on this machine, without asking the hub for a newer one. None if a part is missing."""
    folder: Path | None = Path(model.source).expanduser()
    if folder and not folder.is_dir():
        folder = _downloaded(model.source, model.revision)
    if folder is None or not all((folder / part / _CONFIG_OF.get(part, "config.json")).is_file() for part in parts):
        return None
    return folder


def _downloaded(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the hub's cache on this machine.

    The layout is documented (huggingface_hub, "Understand caching"): ``models--owner--name/refs/<branch>`` contains the
    commit, and ``snapshots/<commit>`` the files. ``snapshot_download`` returns the same folder but asks the hub first.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    home = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    revision = revision or "main"
    try:
        commit = (home / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = home / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The config of ``part``.

    Raises:
        ModelError: it cannot be read or is not JSON.
    """
    path = folder / part / _CONFIG_OF.get(part, "config.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "Download the model again") from error
    return config


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part, in the order of their names.

    Raises:
        ModelError: there is none, or a file that the index names is missing.
    """
    files = sorted((folder / part).glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder / part} has no .safetensors file", "Download the model again, in the safetensors format"
        )
    for index in sorted((folder / part).glob("*.safetensors.index.json")):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(named - {f.name for f in files})
        if absent:
            raise ModelError(f"{folder / part} lacks {', '.join(absent)}", "Download the model again")
        return [f for f in files if f.name in named]
    return files


def _from_hub(repo: str, revision: str | None, parts: tuple[str, ...]) -> Path:
    """The snapshot of the revision that the hub has now. If the hub cannot be reached, the one on this machine."""
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    snapshot = _downloaded(repo, revision)
    missing = _missing_file(snapshot, parts) if snapshot else ""
    # The base class of everything that the client's httpx raises: no route, no name, a timeout, a proxy.
    http_error: Any = HfHubHTTPError.__mro__[1]
    unreachable = (http_error, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, ConnectionError)
    try:
        if snapshot and not missing:
            commit = revision if revision == snapshot.name else model_info(repo, revision=revision, timeout=10).sha
            if commit == snapshot.name:
                return snapshot
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=["model_index.json", *(f"{p}/*" for p in parts)])
        )
    except unreachable as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        if snapshot and not missing:
            if not HF_HUB_OFFLINE:
                note(
                    f"Using the downloaded copy of {repo} (commit {snapshot.name[:8]}): cannot reach the hub to check "
                    f"for a newer one ({reason})"
                )
            return snapshot
        state = f"is incomplete on this machine ({missing} is missing)" if snapshot else "is not on this machine"
        raise ModelError(
            f"The model {repo} {state} and cannot be downloaded ({reason})",
            "Connect to the hub once, or give a local folder with --model DIR",
        ) from error


def _missing_file(folder: Path, parts: tuple[str, ...]) -> str:
    """The first file that is missing, because a download was interrupted or was of other parts; "" if none is.

    A file that is in a snapshot is complete: the hub's client puts it there last.
    """
    for part in parts:
        config = folder / part / _CONFIG_OF.get(part, "config.json")
        if not config.is_file():
            return f"{part}/{config.name}"
        if part not in _CONFIG_OF:
            try:
                weight_files(folder, part)
            except ModelError:
                return f"a weight file of {part}"
    return ""
