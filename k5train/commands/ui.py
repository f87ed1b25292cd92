"""``k5train ui``: the page over a project's datasets, caches and runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from k5cache.shared import console
from k5cache.shared.checkpoint import check_is_model
from k5cache.shared.errors import OutputError
from k5cache.shared.model import ModelConfig
from k5train.commands.arguments import Model

NEEDED = ("starlette", "uvicorn", "jinja2", "python_multipart")


def ui(
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 8001,
    host: Annotated[
        str, typer.Option(help="Serve for other machines too, on this address; 0.0.0.0 for all. They need a token.")
    ] = "127.0.0.1",
    folder: Annotated[Path, typer.Option(help="The folder with datasets/, cache/ and runs/.")] = Path(),
    model: Model = None,
    token: Annotated[
        bool, typer.Option("--token", help="Ask for a token on this machine too, if others use it.")
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show a page in the browser: pictures and crops, new runs, a queue, live curves and samples.

    Nothing outside the folder is read or written, and nothing is sent anywhere. What is started from the page goes on
    when the page ends.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise OutputError(
            f"The page needs packages that are not installed: {', '.join(missing)}",
            "Install its extra, in the checkout: pip install -e '.[ui]'",
        )
    from k5train.ui.project import open_project
    from k5train.ui.serve import serve

    def say(url: str) -> None:
        console.out.print(url, style="bold cyan")
        console.out.file.flush()
        console.note(f"The page over {project.root}. Ctrl-C ends it.")
        if open_:
            typer.launch(url)

    if model:
        check_is_model(ModelConfig(path=model))
    # What the page starts runs in the project's folder, and the model was named from here.
    project = open_project(folder, str(Path(model).absolute()) if model and Path(model).is_dir() else model)
    serve(project, host, port, token, say)
