"""How do values become HTML? Templates in which everything is escaped; also for a report, without a server."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from k5train.ui import words
from k5train.ui.charts import spark, svg

TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def environment() -> jinja2.Environment:
    """All templates. A name that a template uses and nobody gives is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters.update(words.FILTERS)
    made.globals.update(svg=svg, spark=spark)
    return made


def fragment(name: str, **values: Any) -> Markup:
    """A part of a page, from a template of its own: what ``events.stream`` sends, and what pages include."""
    return Markup(environment().get_template(name).render(**values))
