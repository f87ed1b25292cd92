"""What of a run is sent to the hub? One LoRA, its recipe, its pictures and a page; never a credential."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from k5cache.shared import hub, upload
from k5cache.shared.command_line import command
from k5cache.shared.console import human_bytes, note
from k5cache.shared.errors import HubError, K5Error, RunError
from k5cache.shared.model import FLAVOURS, ModelConfig
from k5cache.shared.plain import open_plain, parse_json
from k5cache.shared.recipe import to_dict, to_toml
from k5cache.shared.template import PIPELINES
from k5train.options.train import TrainConfig
from k5train.pictures.saved import picture_files
from k5train.publish.card import MARK, Facts, call_for, card
from k5train.runs.folder import Run, open_run
from k5train.runs.written import check_recorded
from k5train.training.which_loras import choose

PAGE, RECIPE = "README.md", "recipe.toml"
_MOST_HEADER = 16 << 20
_MOST_PICTURES = 12
_MOST_PAGE = 1 << 20


@dataclass(frozen=True)
class Parcel:
    """What would be sent."""

    repo: str
    lora: Path
    page: str
    call: str
    """By which diffusers loads it."""
    base_model: str | None
    """That the page names."""
    files: Mapping[str, upload.Content]
    """Without the page: name in the repository -> content."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    repo: str
    url: str
    is_public: bool
    lora: Path
    files: tuple[str, ...]
    """That were sent."""
    num_bytes: int
    """That were sent."""
    num_there: int
    """Files that the repository had already."""
    has_own_page: bool
    """Whether the repository has a page that its owner wrote, which stays."""


def default_name(root: Path) -> str:
    """The run's name, as far as a repository may be called so."""
    return re.sub(r"[^\w.-]+|--+|\.\.+", "-", Run(root).name, flags=re.ASCII).strip("-.") or "lora"


def wrap(
    root: Path, repo: str, which: str = "final", base_model: str | None = None, license_: str | None = None
) -> Parcel:
    """Everything that a push of a run sends, made ready on this machine.

    Args:
        repo: ``owner/name``.
        which: ``final``, ``best``, ``ema`` or a step.
        base_model: the hub repository of the base, where the run's model is a folder.

    Raises:
        RunError: there is no such LoRA, or it is not the file that the run wrote.
        HubError: a credential is in the LoRA's header.
    """
    run, model, config, cache = open_run(root)
    (choice,) = choose(run, [which], [], [])
    check_recorded(choice.path)
    metadata = _metadata(choice.path)
    if any(hub.without_tokens(value) != value for value in metadata.values()):
        raise HubError(
            f"{choice.path} has a credential in its header, and is not pushed",
            "Remove it from the recipe and train again, or write the file anew: k5train export FILE --format diffusers",
        )
    step = int(metadata["k5.step"]) if metadata.get("k5.step", "").isdigit() else 0
    pictures = picture_files(run.samples(step))[:_MOST_PICTURES]
    samples = {f"images/{path.name}": (path, prompt) for path, prompt in pictures}
    facts = Facts(
        repo=repo,
        name=run.name,
        file=choice.path.name,
        pipeline=metadata.get("k5.pipeline", PIPELINES["t2i"]),
        algo=config.lora.algo,
        base_model=base_model or _base_model(model),
        trigger=metadata.get("modelspec.trigger_phrase") or _trigger(cache),
        step=step,
        caches=_parsed(metadata.get("k5.caches"), []),
        base_fingerprint=metadata.get("k5.base_fingerprint", ""),
        versions=_parsed(metadata.get("k5.versions"), {}),
        settings=to_dict(config),
        samples=[(file, prompt) for file, (_, prompt) in samples.items()],
        license=license_,
    )
    files: dict[str, upload.Content] = {
        **{file: path for file, (path, _) in samples.items()},
        RECIPE: hub.without_tokens(_recipe(model, config)).encode(),
        choice.path.name: choice.path,
    }
    return Parcel(repo, choice.path, hub.without_tokens(card(facts)), call_for(facts), facts.base_model, files)


def push(parcel: Parcel, is_public: bool = False, advance: Callable[[str, int, int], None] = lambda *_: None) -> Pushed:
    """Send it to a repository of one's own, which is made if there is none.

    Raises:
        HubError: the hub refuses, or the repository holds something that no push of ours made.
    """
    repo = parcel.repo
    with hub.answering(f"push {parcel.lora} to {repo}"):
        destination = upload.look_at(repo, "model", is_public)
        has_own_page = _has_own_page(destination)
        files = {**parcel.files} if has_own_page else {**parcel.files, PAGE: parcel.page.encode()}
        to_send = upload.absent(destination, files)
        size = sum(map(upload.num_bytes, to_send.values()))
        if to_send:
            destination = upload.make(destination)
            advance("sending", 0, size)
            note(f"Sending {human_bytes(size)} to {repo}")
            title = f"{parcel.lora.stem}, by k5train push"
            upload.send(destination, to_send, title, advance=lambda sent: advance("sending", sent, size))
    num_there = len(files) - len(to_send)
    return Pushed(
        repo, destination.url, destination.is_public, parcel.lora, tuple(to_send), size, num_there, has_own_page
    )


def _has_own_page(destination: upload.Destination) -> bool:
    """Whether a page of the owner's stays.

    Raises:
        HubError: the repository has files, and none of them says that a push of ours made it.
    """
    if not destination.names:
        return False
    is_ours = False
    if PAGE in destination.names:
        with tempfile.TemporaryDirectory(prefix="k5-") as folder:
            path = hub.api().hf_hub_download(destination.repo, PAGE, local_dir=folder)
            with Path(path).open("rb") as file:
                is_ours = MARK.encode() in file.read(_MOST_PAGE)
    if not is_ours and RECIPE not in destination.names:
        others = ", ".join(sorted(destination.names)[:3])
        raise HubError(
            f"{destination.repo} holds other files, and was not made by k5train push: {others}",
            f"Name another repository: {command('k5train', 'push', 'RUN', 'OTHER')}",
        )
    return PAGE in destination.names and not is_ours


def _metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file.

    Raises:
        RunError: it is not one.
    """
    try:
        with open_plain(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEADER:
                raise ValueError("its header is too long")
            metadata = parse_json(file.read(length)).get("__metadata__") or {}
        return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not a safetensors file", "Choose another LoRA with --which") from error


def _parsed(text: str | None, default: Any) -> Any:
    with suppress(ValueError):
        value = json.loads(text or "")
        if isinstance(value, type(default)):
            return value
    return default


def _base_model(model: ModelConfig) -> str | None:
    """The hub repository of the base; None if the model is a folder."""
    is_repository = hub.REPOSITORY.fullmatch(model.source) and not Path(model.source).exists()
    return model.source if model.source in FLAVOURS.values() or is_repository else None


def _trigger(cache: Path) -> str | None:
    """The trigger of the run's cache, if that is still where it was."""
    from k5cache.store.manifest import read_manifest

    try:
        trigger = read_manifest(cache).recipe.get("selection", {}).get("trigger")
    except (K5Error, OSError):
        return None
    return trigger if isinstance(trigger, str) else None


def _recipe(model: ModelConfig, config: TrainConfig) -> str:
    """The run's recipe, with the names of folders instead of their places on this machine."""

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_places(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [without_places(inner) for inner in value]
        if isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:[\\/])[^\n]*$", value):
            return PurePosixPath(value.replace("\\", "/")).name
        return value

    return to_toml(without_places({"model": to_dict(model), "train": to_dict(config)}))
