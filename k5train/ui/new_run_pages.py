"""``/new``: a recipe as a form and as text, checked as it is typed, planned, saved, and started."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from k5cache.shared.errors import K5Error, RecipeError
from k5train.ui.actions import NOTICES, action, redirect
from k5train.ui.early import early
from k5train.ui.new_run import launching
from k5train.ui.new_run.draft import Draft, begun, sent
from k5train.ui.new_run.planner import Planner
from k5train.ui.new_run.planning import NOTHING, PlanView, plan_view
from k5train.ui.new_run.saving import WouldReplace, save
from k5train.ui.new_run.starts import started
from k5train.ui.new_run.view import View, checked_draft, choices, chosen_caches, view
from k5train.ui.pages import project_of, render
from k5train.ui.templating import fragment

NOTICES.update(recipe_saved="The recipe is saved.")
_beginning = threading.Lock()


def routes() -> list[Route]:
    """The view's pages."""
    return [
        Route("/new", early("new_run.html", new)),
        Route("/new", action(check_all), methods=["POST"]),
        Route("/new/check", action(check_typed), methods=["POST"]),
        Route("/new/plan", action(plan), methods=["POST"]),
        Route("/new/start", action(start), methods=["POST"]),
        Route("/new/sweep", action(sweep), methods=["POST"]),
        Route("/new/save", action(save_recipe), methods=["POST"]),
        Route("/new/recipe.toml", action(download), methods=["POST"]),
    ]


def new(request: Request) -> Response:
    """The form, with what the URL says to start from."""
    project, asked = project_of(request), request.query_params
    start = started(
        project, asked.get("recipe", ""), asked.get("file", ""), asked.get("run", ""), asked.getlist("cache")
    )
    shown = view(project, begun(start))
    return _page(request, shown, notes=start.notes, is_asked=bool({*asked} & {"recipe", "file", "run"}))


def check_all(request: Request, form: FormData) -> Response:
    """The form as it was sent, checked and planned: what works without JavaScript."""
    project, draft = project_of(request), _draft(form)
    checked, chosen = checked_draft(project, draft)
    planned = plan_view(project, planner_of(request), draft.text, checked, chosen) or NOTHING
    return _page(request, view(project, draft), planned)


def check_typed(request: Request, form: FormData) -> Response:
    """What has changed beside the form since something was typed, as JSON."""
    shown = view(project_of(request), _draft(form))
    is_toml = shown.checked.is_toml
    options = {
        option.field.name: {
            "text": option.text,
            "changed": option.is_changed,
            "problem": " ".join(option.problems),
            "caution": " ".join(option.cautions),
        }
        for option in shown.options()
    }
    return JSONResponse(
        {
            "text": shown.draft.text,
            "base": shown.draft.text if is_toml else shown.draft.base,
            "options": options,
            "name": shown.name,
            "said": fragment("new_run_said.html", view=shown),
            "plan": shown.checked.config is not None,
        }
    )


def plan(request: Request, form: FormData) -> Response:
    """The plan and the time, as a fragment. Nothing if a newer plan was asked for meanwhile."""
    project, draft = project_of(request), _draft(form)
    checked, chosen = checked_draft(project, draft)
    planned = plan_view(project, planner_of(request), draft.text, checked, chosen, is_timed="timed" in form)
    if planned is None:
        return Response(status_code=204)
    return Response(fragment("new_run_plan.html", plan=planned), media_type="text/html")


def start(request: Request, form: FormData) -> Response:
    """Put the run into the queue."""
    return _started(request, _draft(form), is_sweep=False)


def sweep(request: Request, form: FormData) -> Response:
    """Put a sweep into the queue."""
    return _started(request, _draft(form), is_sweep=True)


def _started(request: Request, draft: Draft, is_sweep: bool) -> Response:
    project = project_of(request)
    chosen = chosen_caches(project, draft)
    kind = "sweep" if is_sweep else "run"
    try:
        if is_sweep and not draft.axes:
            raise RecipeError("No values are given to try", "Write some, such as 8, 16, 32")
        name = draft.name or launching.free_name(project, view(project, draft).base_name, kind)
        planner_of(request).end()  # before the run looks for free memory
        if is_sweep:
            job = launching.start_sweep(project, draft.text, name, chosen, draft.axes, draft.gpus)
        else:
            job = launching.start(project, draft.text, name, chosen)
    except K5Error as error:
        return _refused(request, draft, error)
    return redirect(f"/jobs/{job.id}", "queued")


def save_recipe(request: Request, form: FormData) -> Response:
    """Save the recipe in the project, and go on with the file."""
    project, draft = project_of(request), _draft(form)
    try:
        saved = save(project, draft)
    except K5Error as error:
        return _refused(request, draft, error)
    chosen = "".join(f"&cache={entry.id}" for entry in chosen_caches(project, draft))
    return redirect(f"/new?file={saved.id}{chosen}", "recipe_saved")


def download(request: Request, form: FormData) -> Response:
    """The recipe as a file."""
    return Response(
        _draft(form).text.encode("utf-8", "replace"),
        media_type="application/toml",
        headers={"Content-Disposition": 'attachment; filename="recipe.toml"', "Cache-Control": "no-store"},
    )


def planner_of(request: Request) -> Planner:
    """The planner of this page."""
    state = request.app.state
    with _beginning:
        if not hasattr(state, "planner"):
            state.planner = Planner(project_of(request).root)
            state.at_end.append(state.planner.close)
    planner: Planner = state.planner
    return planner


def _draft(form: FormData) -> Draft:
    values = {name: [v for v in form.getlist(name) if isinstance(v, str)] for name in form}
    return sent({name: texts for name, texts in values.items() if texts})


def _refused(request: Request, draft: Draft, error: K5Error) -> Response:
    """The form as it was, with what is wrong: nothing that was typed is lost."""
    replaces = error.seen if isinstance(error, WouldReplace) else ""
    return _page(
        request, view(project_of(request), draft), error=error, replaces=replaces, status=409 if replaces else 400
    )


def _page(
    request: Request, shown: View, plan: PlanView = NOTHING, notes: Sequence[str] = (), error: K5Error | None = None,
    replaces: str = "", status: int = 200, is_asked: bool = True,
) -> Response:  # fmt: skip
    return render(
        request, "new_run.html", status, view=shown, plan=plan, notes=notes, error=error, replaces=replaces,
        choices=choices(project_of(request)), is_asked=is_asked,
    )  # fmt: skip
