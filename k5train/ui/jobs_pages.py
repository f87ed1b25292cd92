"""The pages of the queue and of a job, and what is done with runs: stop, resume, save now, sample now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5cache.shared.errors import RunError
from k5cache.shared.lock import holder
from k5train.runs import requests
from k5train.ui import listing
from k5train.ui.actions import NOTICES, action, redirect, text
from k5train.ui.events import stream
from k5train.ui.jobs import queue, view
from k5train.ui.jobs.again import again
from k5train.ui.listing import Entry
from k5train.ui.pages import fragment, project_of, render

NOTICES.update(
    {
        "ended": "Told it to end at once.",
        "moved": "Moved.",
        "asked_save": "Asked for a checkpoint: it is written after this step.",
        "asked_sample": "Asked for pictures: they are drawn after this step.",
        "begun": "Whatever can begin has begun.",
        "cleared": "Removed everything that had ended from the list. Runs and caches stay.",
    }
)
MOST_STEPS = 10**9
MOST_BYTES = 4096


def queue_page(request: Request) -> Response:
    """``/queue``."""
    shown = view.queue_view(project_of(request))
    return render(request, "queue.html", **_queue_fragments(shown))


def queue_events(request: Request) -> Response:
    """The same, as it changes."""
    project = project_of(request)

    def changes() -> Mapping[str, str]:
        return {f"queue-{name}": html for name, html in _queue_fragments(view.queue_view(project)).items()}

    return stream(request, changes)


def _queue_fragments(shown: view.Queue) -> dict[str, Any]:
    """What changes with a click, and what changes all the time. A button must not go away under the mouse."""
    return {
        "jobs": fragment("queue_jobs.html", queue=shown, words=view.WORDS),
        "bars": fragment("queue_bars.html", queue=shown),
    }


def job_page(request: Request) -> Response:
    """``/jobs/<id>``."""
    shown = view.job_view(project_of(request), request.path_params["id"])
    return render(request, "job.html", view=shown, **_job_fragments(shown))


def job_events(request: Request) -> Response:
    """The same, as it changes."""
    project, id = project_of(request), request.path_params["id"]
    queue.find(project, id)

    def changes() -> Mapping[str, str]:
        return {f"job-{name}": html for name, html in _job_fragments(view.job_view(project, id)).items()}

    return stream(request, changes)


def _job_fragments(shown: view.JobView) -> dict[str, Any]:
    return {
        "state": fragment("job_state.html", view=shown, words=view.WORDS),
        "bars": fragment("job_bars.html", job=shown.job, progress=shown.progress),
        "log": fragment("job_log.html", view=shown),
    }


def _stop_job(request: Request, data: FormData) -> Response:
    at_once = text(data, "at_once", 10) == "yes"
    queue.stop(project_of(request), request.path_params["id"], at_once)
    return _back(request, data, "ended" if at_once else "stopped")


def _remove_job(request: Request, data: FormData) -> Response:
    queue.remove(project_of(request), request.path_params["id"])
    return redirect("/queue", "removed")


def _move_job(request: Request, data: FormData) -> Response:
    places = {"up": -1, "down": 1, "first": -(10**6)}.get(text(data, "to", 10), 0)
    queue.move(project_of(request), request.path_params["id"], places)
    return redirect("/queue", "moved")


def _start_job(request: Request, data: FormData) -> Response:
    queue.start_anyway(project_of(request), request.path_params["id"])
    return _back(request, data, "begun")


def _again(request: Request, data: FormData) -> Response:
    job = again(project_of(request), request.path_params["id"])
    return redirect(f"/jobs/{job.id}", "queued")


def _back(request: Request, data: FormData, notice: str) -> Response:
    """To the page that the form is on."""
    is_queue = text(data, "from", 10) == "queue"
    job = queue.find(project_of(request), request.path_params["id"])
    return redirect("/queue" if is_queue else f"/jobs/{job.id}", notice)


def _advance(request: Request, data: FormData) -> Response:
    queue.advance(project_of(request))
    return redirect("/queue", "begun")


def _clear(request: Request, data: FormData) -> Response:
    queue.clear(project_of(request))
    return redirect("/queue", "cleared")


def _run(request: Request) -> Entry:
    return listing.find(listing.all_runs(project_of(request)), request.path_params["id"])


def _stop_run(request: Request, data: FormData) -> Response:
    run = _run(request)
    queue.stop_run(project_of(request), run.path)
    return redirect(f"/runs/{run.id}", "stopped")


def _resume_run(request: Request, data: FormData) -> Response:
    project, run = project_of(request), _run(request)
    steps = _steps(text(data, "steps", 40))
    for job in queue.jobs(project):
        if job.about == run.relative and not job.is_over:
            raise RunError(f"{run.relative} is in the queue already", "Look at the queue")
    if holder(run.path / ".lock"):
        raise RunError(f"{run.relative} is being trained", "Wait for it, or stop it first")
    argv = ["k5train", "resume", run.relative, *(["--set", f"train.steps={steps}"] if steps else [])]
    job = queue.add(project, argv, f"resume {run.name}", "resume", run.relative)
    return redirect(f"/jobs/{job.id}", "queued")


def _steps(asked: str) -> int | None:
    """The new number of steps; None if the field is empty.

    Raises:
        RunError: it is no number of steps.
    """
    asked = asked.strip().replace(",", "")
    if not asked:
        return None
    if not (asked.isascii() and asked.isdigit() and 0 < int(asked) <= MOST_STEPS):
        raise RunError(f"{asked!r} is not a number of steps", "Give the total, the steps so far included, such as 4000")
    return int(asked)


def _save_run(request: Request, data: FormData) -> Response:
    run = _run(request)
    requests.ask(run.path, "save")
    return redirect(f"/runs/{run.id}", "asked_save")


def _sample_run(request: Request, data: FormData) -> Response:
    run = _run(request)
    requests.ask(run.path, "sample")
    return redirect(f"/runs/{run.id}", "asked_sample")


def routes() -> list[Route]:
    """The URLs of this view."""
    actions = {
        "/queue/advance": _advance, "/queue/clear": _clear, "/jobs/{id}/stop": _stop_job,
        "/jobs/{id}/remove": _remove_job, "/jobs/{id}/move": _move_job, "/jobs/{id}/start": _start_job,
        "/jobs/{id}/again": _again, "/runs/{id}/stop": _stop_run, "/runs/{id}/resume": _resume_run,
        "/runs/{id}/save": _save_run, "/runs/{id}/sample": _sample_run,
    }  # fmt: skip
    return [
        Route("/queue", queue_page),
        Route("/queue/events", queue_events),
        Route("/jobs/{id}", job_page),
        Route("/jobs/{id}/events", job_events),
        *(Route(path, action(handle, MOST_BYTES), methods=["POST"]) for path, handle in actions.items()),
    ]
