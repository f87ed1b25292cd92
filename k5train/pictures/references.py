"""What stands above and below the drawn rows of a grid of pairs? The sources, and what the edits should become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from k5train.pictures.drawing import Drawing
from k5train.pictures.sample import decode
from k5train.pictures.saved import read_pictures, save_pictures
from k5train.runs.folder import Run

_UNKNOWN = (235, 235, 235)  # the colour of a target that the cache does not have
Row = tuple[str, list[Image.Image]]


class References(NamedTuple):
    """Labelled rows of a grid."""

    above: tuple[Row, ...] = ()
    below: tuple[Row, ...] = ()


def decode_references(folder: Path, drawings: Sequence[Drawing], device: torch.device) -> References:
    """The sources of some pairs, and their targets if any is known, decoded from their cached means.

    Args:
        folder: the checkpoint, whose VAE is loaded and freed.
    """
    sources = [drawing.source.latents for drawing in drawings if drawing.source]
    if not sources:
        return References()
    targets = [drawing.target.latents for drawing in drawings if drawing.target]
    pictures = decode(folder, [*sources, *targets], device)
    known = iter(pictures[len(sources) :])
    below = [
        next(known) if drawing.target else Image.new("RGB", picture.size, _UNKNOWN)
        for drawing, picture in zip(drawings, pictures[: len(sources)], strict=True)
    ]
    above = (("source", pictures[: len(sources)]),)
    return References(above, (("target", below),) if targets else ())


def references(
    run: Run, drawings: Sequence[Drawing], drawn: Mapping[str, Any], folder: Path, device: torch.device
) -> References:
    """``decode_references``, kept in the run, so that they are decoded once.

    Args:
        drawn: as the pictures of a step have it.
    """
    if not any(drawing.source for drawing in drawings):
        return References()
    read = read_references(run.root, drawn)
    is_lacking_targets = read is not None and not read.below and any(drawing.target for drawing in drawings)
    if read is None or is_lacking_targets:
        read = decode_references(folder, drawings, device)
        run.check_there()
        for label, pictures in (*read.above, *read.below):
            save_pictures(_folder(run.root, label), pictures, drawn)
    return read


def read_references(run: Path, drawn: Mapping[str, Any] | None = None) -> References | None:
    """What ``references`` kept. None: nothing, or of other pairs than ``drawn``."""
    above, below = (read_pictures(_folder(run, label), drawn) for label in ("source", "target"))
    if above is None:
        return None
    return References((("source", above),), (("target", below),) if below else ())


def _folder(run: Path, label: str) -> Path:
    return run / "samples" / "pairs" / label
