"""The page of a run: how it goes, live; its pictures, settings and files."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from k5cache.shared.inside import is_inside
from k5train.runs.written import check_recorded
from k5train.ui import listing
from k5train.ui.charts import svg
from k5train.ui.early import early
from k5train.ui.events import stream
from k5train.ui.jobs import queue
from k5train.ui.jobs.job import Job, Progress, progress, tail
from k5train.ui.jobs.view import readable
from k5train.ui.listing import Entry, NotHere
from k5train.ui.pages import fragment, project_of, render
from k5train.ui.project import Project
from k5train.ui.run_pictures import picture_src
from k5train.ui.runs.state import BADGES
from k5train.ui.runs.view import RunView, read_run

_LOG_BYTES = 8 << 10
_PAUSES = 10
"""Times as long as a look took passes until the next: a tenth of a core is the most that an open page costs."""


def run_page(request: Request) -> Response:
    """``/runs/<id>``."""
    project, entry = _entry(request)
    job = _job(project, entry)
    run = read_run(entry.path, job, Path(entry.relative))
    if not run.settings and not run.problems and not (entry.path / "run.json").exists():
        raise NotHere("This run is no longer here: it was deleted, moved or renamed", "Choose another one")
    return render(
        request,
        "run.html",
        run=run,
        entry=entry,
        job=job,
        cache=_cache(project, entry),
        sweep=_sweep(project, entry),
        **_fragments(project, entry, run, job),
    )


def run_events(request: Request) -> Response:
    """The same, as it changes."""
    project, entry = _entry(request)

    last: dict[str, Any] = {}
    due = 0.0

    def changes() -> Mapping[str, str]:
        nonlocal last, due
        listing.find(listing.all_runs(project), entry.id)  # raises when it was deleted
        began = time.monotonic()
        if began >= due:
            job = _job(project, entry)
            last = _fragments(project, entry, read_run(entry.path, job, Path(entry.relative)), job)
            due = time.monotonic() + _PAUSES * (time.monotonic() - began)
        return {f"run-{name}": html for name, html in last.items()}

    return stream(request, changes)


def _fragments(project: Project, entry: Entry, run: RunView, job: Job | None) -> dict[str, Any]:
    """What changes while it is trained. Buttons are apart from numbers: none goes away under the mouse."""
    return {
        "head": fragment("run_head.html", run=run, badges=BADGES, job=job, progress=_besides(run, job)),
        "actions": fragment("run_actions.html", run=run, entry=entry),
        "facts": fragment("run_facts.html", run=run),
        "curves": fragment("run_curves.html", run=run, svg=svg),
        "pictures": fragment("run_pictures.html", run=run, picture=picture_src(project), is_page=True),
        "files": fragment("run_files.html", run=run, entry=entry),
        "log": fragment("run_log.html", log=readable(tail(job, _LOG_BYTES)) if job else "", job=job),
    }


def _besides(run: RunView, job: Job | None) -> Progress | None:
    """What a run does besides its steps, such as drawing samples before the first: else it would seem to stand."""
    all_bars = progress(job) if job and run.state.word == "running" else None
    bars = tuple(task for task in all_bars.tasks if not task.name.startswith("training ")) if all_bars else ()
    return Progress(bars) if bars else None


def run_file(request: Request) -> Response:
    """A LoRA of a run, to download, if it is the one that the run wrote."""
    project, entry = _entry(request)
    which = request.path_params["which"]
    for file in read_run(entry.path).files:
        if file.which == which and is_inside(project.root, file.path):
            check_recorded(file.path)
            name = file.path.name if not which.isdecimal() else f"{entry.name}-{file.path.name}"
            return FileResponse(
                file.path, media_type="application/octet-stream", filename=name, headers={"Cache-Control": "no-store"}
            )
    raise NotHere("This LoRA is no longer here", "Reload the page of the run")


def _entry(request: Request) -> tuple[Project, Entry]:
    project = project_of(request)
    return project, listing.find(listing.all_runs(project), request.path_params["id"])


def _job(project: Project, entry: Entry) -> Job | None:
    """The newest job that trains this run, or that trains the sweep that it is in."""
    about = {entry.relative, entry.relative.rpartition("/")[0]}
    kinds = ("run", "resume", "sweep")
    return next((job for job in queue.jobs(project) if job.about in about and job.kind in kinds), None)


def _cache(project: Project, entry: Entry) -> Entry | None:
    """The run's first cache, if it is one of the project's."""
    from k5train.ui.data.state import caches_of_run  # pyarrow, which the page is up without

    named = caches_of_run(project, entry.path)[:1]
    return next((cache for cache in listing.caches(project) if os.path.realpath(cache.path) in named), None)


def _sweep(project: Project, entry: Entry) -> Entry | None:
    """The sweep that the run is in."""
    above = entry.relative.rpartition("/")[0]
    return next((sweep for sweep in listing.sweeps(project) if sweep.relative == above), None)


def routes() -> list[Route]:
    """The URLs of this view."""
    return [
        Route("/runs/{id}", early("run.html", run_page, lambda request: {"entry": _entry(request)[1]})),
        Route("/runs/{id}/events", run_events),
        Route("/runs/{id}/files/{which}", run_file),
    ]
