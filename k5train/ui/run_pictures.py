"""The pictures of runs, at URLs that name a run by its id, and the picture by step, kind and number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5cache.shared.inside import is_inside
from k5cache.shared.plain import open_plain
from k5cache.sources.items import UnreadableImage
from k5train.pictures.saved import files_of
from k5train.runs.folder import Run
from k5train.ui import listing
from k5train.ui.ids import id_of
from k5train.ui.listing import NotHere
from k5train.ui.pages import project_of
from k5train.ui.project import Project
from k5train.ui.static_files import UNCHANGING

_MOST_BYTES = 256 << 20
KINDS = ("run", "ema", "source", "target")
_GONE = ("This picture is no longer here", "Reload the page that showed it")


def picture_src(project: Project) -> Callable[..., str]:
    """A function that gives the URL of a picture of a run in the project: ``picture(path, small=False)``.

    The URL has a version, which changes with the file.
    """

    def src(path: Path, small: bool = False) -> str:
        kind, step, root = _place_of(path)
        files = files_of(path.parent)
        number = files.index(path) if path in files else len(files)  # what it shows cannot be read: none answers
        try:
            status = path.stat()
            version = f"{status.st_mtime_ns:x}-{status.st_size:x}"
        except OSError:
            version = "gone"
        url = f"/runs/{id_of(project.relative(root))}/pictures/{kind}/{step}/{number}?v={version}"
        return url + "&small=1" * small

    return src


def _place_of(path: Path) -> tuple[str, int, Path]:
    """Kind, step and run of a picture: ``samples/step-000500[/ema]`` or ``samples/pairs/source``."""
    folder = path.parent
    if folder.name in ("source", "target"):
        return folder.name, 0, folder.parent.parent.parent
    kind = "ema" if folder.name == "ema" else "run"
    step = folder.parent if kind == "ema" else folder
    return kind, int(step.name.removeprefix("step-")), step.parent.parent


def _folder_of(run: Run, kind: str, step: int) -> Path:
    if kind in ("source", "target"):
        return run.root / "samples" / "pairs" / kind
    return run.samples(step) / "ema" if kind == "ema" else run.samples(step)


def answer(request: Request) -> Response:
    """One picture."""
    project, asked = project_of(request), request.path_params
    entry = listing.find(listing.all_runs(project), asked["id"])
    if asked["kind"] not in KINDS:
        raise NotHere(*_GONE)
    files = files_of(_folder_of(Run(entry.path), asked["kind"], asked["step"]))
    if asked["number"] >= len(files) or not is_inside(project.root, files[asked["number"]]):
        raise NotHere(*_GONE)
    path = files[asked["number"]]
    try:
        if request.query_params.get("small"):
            from k5train.ui.data.thumbnails import small_file  # Pillow

            content, kind = small_file(project, path), "image/webp"
        else:
            with open_plain(path, _MOST_BYTES) as file:
                content, kind = file.read(), "image/png"
    except (FileNotFoundError, UnreadableImage):
        raise NotHere(*_GONE) from None
    return Response(content, media_type=kind, headers={"Cache-Control": UNCHANGING})


def routes() -> list[Route]:
    """The URLs of pictures."""
    return [Route("/runs/{id}/pictures/{kind}/{step:int}/{number:int}", answer)]
