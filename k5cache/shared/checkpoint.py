"""Where is a checkpoint? In a folder in the diffusers layout, or in a hub repository, of which only what is used is
fetched (``download.py``).

One short request asks the hub which commit a revision is. What is complete on this machine is not downloaded again. If
the hub cannot be reached, the downloaded copy is used, and a note says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from k5cache.shared import download, hub
from k5cache.shared.config_sizes import size_problems
from k5cache.shared.console import note
from k5cache.shared.errors import ModelError
from k5cache.shared.model import FLAVOURS, ModelConfig
from k5cache.shared.part_files import config_name, has_weights, weight_files
from k5cache.shared.parts import check_parts
from k5cache.shared.plain import read_json, read_text

ENCODER_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def model_folder(model: ModelConfig, parts: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint, with ``parts`` (``transformer``, ``vae``, ...) in it.

    Raises:
        ModelError: there is no such folder or repository, the hub cannot be reached, a file is missing, or the
            parts do not belong together.
    """
    folder = _local_folder(model) or _from_hub(model.source, model.revision, parts)
    _check(folder, parts)
    for part in parts:
        if has_weights(part):
            weight_files(folder, part, shows_pictures(folder))
    return folder


def folder_without_weights(model: ModelConfig, parts: tuple[str, ...]) -> Path:
    """A folder with at least the configs of ``parts``, for looking ahead. Downloads only configs, a few kilobytes.

    If using the model would download more, a note says how much. Raises as ``model_folder``.
    """
    folder = _local_folder(model) or _configs_from_hub(model.source, model.revision, parts)
    _check(folder, parts)
    return folder


def check_is_model(model: ModelConfig) -> None:
    """Refuse a folder that is missing or has no part of a model, long before it is used. A repository is not asked for.

    Raises:
        ModelError: that is no model.
    """
    folder = _local_folder(model)
    if folder and not any((folder / part).is_dir() for part in ("transformer", *ENCODER_PARTS)):
        raise ModelError(
            f"{folder} is no model: it has no folder transformer, text_encoder or vae",
            "Give a complete Kandinsky 5 Image repository in the diffusers layout with --model DIR",
        )


def check_known(model: ModelConfig, named_by: Path, fix: str) -> None:
    """Refuse a repository that nobody but a cache or a run names: these may be strangers', and it would be downloaded.

    A folder, a published checkpoint, and a repository of which this machine has something already may be used.

    Args:
        named_by: the cache or the run.
        fix: how the user asks for this model.

    Raises:
        ModelError: the model is none of these.
    """
    is_published = model.source in FLAVOURS.values() and model.revision is None
    is_here = Path(model.source).expanduser().is_dir() or _downloaded(model.source, model.revision)
    if is_published or is_here or not _REPOSITORY.fullmatch(model.source):
        return
    name = f"{model.source} at {model.revision}" if model.revision else model.source
    raise ModelError(
        f"{named_by} names the model {name}, of which nothing is on this machine, and it is not downloaded unasked",
        fix,
    )


def shows_pictures(folder: Path) -> bool:
    """Whether the model shows Qwen a picture, so that its vision tower is needed; also if nothing says that it does
    not."""
    is_there = (folder / "transformer" / "config.json").is_file()
    return not is_there or bool(read_config(folder, "transformer").get("visual_cond"))


def has_part(folder: Path, part: str) -> bool:
    """Whether a part is in a folder with all of its files. A plan fetches configs alone."""
    return not _missing_file(folder, (part,))


def _local_folder(model: ModelConfig) -> Path | None:
    """The folder that the model names; None if it names a repository."""
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        return folder
    if model.path and not _REPOSITORY.fullmatch(model.source):
        raise ModelError(
            f"There is no model folder {model.source}", "Give a folder in the diffusers layout with --model DIR"
        )
    return None


def _check(folder: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        config = folder / part / config_name(part)
        if not config.is_file():
            raise ModelError(
                f"The model folder {folder} lacks {part}/{config.name}",
                "Give a complete Kandinsky 5 Image repository in the diffusers layout with --model DIR",
            )
    compared = ("transformer", *(part for part in parts if has_weights(part)))
    configs = {part: read_config(folder, part) for part in compared if (folder / part / config_name(part)).is_file()}
    check_parts(folder, configs)


def folder_on_disk(model: ModelConfig, parts: tuple[str, ...]) -> Path | None:
    """The folder as it is on this machine, without asking the hub for a newer one. None if a file that is used is
    missing."""
    folder: Path | None = Path(model.source).expanduser()
    if folder and not folder.is_dir():
        folder = _downloaded(model.source, model.revision)
    return folder if folder and not _missing_file(folder, parts) else None


def _downloaded(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the hub's cache on this machine. ``snapshot_download`` returns the same folder
    but asks the hub first."""
    home = hub.home_of(repo)
    revision = revision or "main"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision) or ".." in revision:  # a cache or a run may name it
        return None
    try:
        commit = read_text(home / "refs" / revision, 4096).strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = home / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The config of ``part``.

    Raises:
        ModelError: it cannot be read, is not JSON, or has numbers that no modules can be made of.
    """
    path = folder / part / config_name(part)
    try:
        config: dict[str, Any] = read_json(path)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}", "Download the model again") from error
    if problems := size_problems(part, config):
        raise ModelError(f"{path} cannot be used: {'; '.join(problems)}", "Download the model again")
    return config


def _from_hub(repo: str, revision: str | None, parts: tuple[str, ...]) -> Path:
    """The snapshot of the revision that the hub has now. If the hub cannot be reached, the one on this machine."""
    snapshot = _downloaded(repo, revision)
    missing = _missing_file(snapshot, parts) if snapshot else ""
    try:
        if snapshot and not missing and revision == snapshot.name:
            return snapshot
        remote = download.read_remote(repo, revision)
        if snapshot and not missing and remote.commit == snapshot.name:
            return snapshot
        return download.fetch(remote, parts, shows_pictures)
    except hub.unreachable() as error:
        return _without_the_hub(repo, snapshot, missing, error)


def _configs_from_hub(repo: str, revision: str | None, parts: tuple[str, ...]) -> Path:
    """The snapshot on this machine if it is complete; else one with configs. Notes what remains to be downloaded."""
    snapshot = _downloaded(repo, revision)
    missing = _missing_file(snapshot, parts) if snapshot else ""
    if snapshot and not missing and revision == snapshot.name:
        return snapshot
    try:
        remote = download.read_remote(repo, revision)
        if snapshot and not missing and remote.commit == snapshot.name:
            return snapshot
        is_newer = snapshot is not None and not missing
        folder = snapshot if snapshot and is_newer else download.fetch_small(remote, parts)
        reason = f"the hub has a newer revision, {remote.commit[:8]}" if is_newer else "it is not on this machine"
        size = download.sizes(remote, download.needed(remote, parts, folder, shows_pictures(folder)))
        note(f"Using {repo} will download {size} first: {reason}. Only its configs are read now")
        return folder
    except hub.unreachable() as error:
        if snapshot and all((snapshot / part / config_name(part)).is_file() for part in parts):
            missing = ""  # configs are enough
        return _without_the_hub(repo, snapshot, missing, error)


def _without_the_hub(repo: str, snapshot: Path | None, missing: str, error: Exception) -> Path:
    """The snapshot on this machine, if it has what is needed, with a note unless the user asked to be offline."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    reason = hub.reason_of(error)
    if snapshot and not missing:
        if not HF_HUB_OFFLINE:
            note(
                f"Using the downloaded copy of {repo} (commit {snapshot.name[:8]}): cannot reach the hub to check "
                f"for a newer one ({reason})"
            )
        return snapshot
    state = f"is incomplete on this machine ({missing} is missing)" if snapshot else "is not on this machine"
    connect = hub.fix_of(error) if hub.is_about_login(error) else "Connect to the hub once"
    raise ModelError(
        f"The model {repo} {state} and cannot be downloaded ({reason})",
        f"{connect}, or give a local folder with --model DIR (there is no folder {repo})",
    ) from error


def _missing_file(folder: Path, parts: tuple[str, ...]) -> str:
    """The first file that is missing, because a download was interrupted or was of other parts; "" if none is.

    A file that is in a snapshot is complete: the hub's client puts it there last.
    """
    for part in parts:
        config = folder / part / config_name(part)
        if not config.is_file():
            return f"{part}/{config.name}"
        if has_weights(part):
            try:
                weight_files(folder, part, shows_pictures(folder))
            except ModelError:
                return f"a weight file of {part}"
    return ""
