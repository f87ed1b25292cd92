"""A project with something for every view, and names that try to be more than text; and a way through all its pages."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from k5train.runs.outcomes import Outcome, write_outcomes
from k5train.ui import listing
from k5train.ui.app import Page, create_app
from k5train.ui.guard import Access
from k5train.ui.jobs import folder as job_files
from k5train.ui.jobs import queue
from k5train.ui.project import Project
from tests.store_samples import make_cache
from tests.test_compare import make as make_run

SECRET = "what lies outside of the project"
BASE = "http://127.0.0.1:8001"
ORIGIN = {"origin": BASE}
NASTY = "<script>alert(1)</script>\"'&\x1b[31m"
"""A text that would be more than text in a careless page."""


def make_project(root: Path) -> Project:
    """Datasets, a cache, runs, a sweep and a job; and links that lead out to ``SECRET``."""
    outside = root.parent / f"{root.name}-outside"
    pictures = root / "datasets" / "cats <b>&"
    for folder in (pictures, outside, root / "runs", root / "cache", root / "sweeps"):
        folder.mkdir(parents=True)
    (outside / "secret.txt").write_text(SECRET, encoding="utf-8")
    (outside / "run.json").write_text(SECRET, encoding="utf-8")
    (outside / "manifest.json").write_text(SECRET, encoding="utf-8")
    for name in ("one", "two <i>'\""):
        Image.new("RGB", (96, 80), (200, 80, 40)).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(NASTY, encoding="utf-8")
    (pictures / "broken.png").write_bytes(b"no picture")
    make_cache(root / "cache" / "cats")
    make_run(root / "runs" / "good", ema=0.39, cache="../../cache/cats")
    make_run(root / "runs" / "still <u>", (0.5, 0.48), is_finished=False, cache="../../cache/cats")
    make_run(root / "sweeps" / "rates" / "lr=1e-4", (0.5, 0.48), cache="../../../cache/cats")
    write_outcomes(root / "sweeps" / "rates", [Outcome(label="lr=1e-4", lora="lr=1e-4/lr=1e-4.safetensors", steps=2)])
    for place in ("datasets", "cache", "runs", "sweeps"):
        (root / place / "leads-out").symlink_to(outside)
    project = Project(root.resolve())
    document = {
        "argv": ["k5train", "run", "cache/cats"], "label": NASTY, "kind": "run", "about": "runs/good", "uses": [],
        "after": [], "order": 1, "added": 1.0,
    }  # fmt: skip
    job_files.new_folder(job_files.make_queue_folder(project), document, {})
    return project


def client_of(project: Project, access: Access | None = None) -> tuple[TestClient, Page]:
    """A browser without a screen, and the app. Streams end after their first state."""
    page = create_app(project, access)
    page.state.listeners.close()
    page.state.planner = SimpleNamespace(ask=lambda question, slot: None, end=lambda: None)  # it would be a process
    return TestClient(page, base_url=BASE, raise_server_exceptions=False, follow_redirects=False), page


@contextmanager
def without_processes() -> Iterator[None]:
    """Until the end of the block, a job that begins is no process."""
    spawn, queue._spawn = queue._spawn, lambda *words: SimpleNamespace(pid=os.getpid())
    yield
    queue._spawn = spawn


def ids(project: Project) -> list[str]:
    """Everything that may stand for ``<id>`` in a URL."""
    entries = [*listing.folders(project), *listing.caches(project), *listing.all_runs(project)]
    entries += listing.sweeps(project)
    return [entry.id for entry in entries] + [path.name for path in job_files.job_folders(project)]


def urls(route: Route, values: list[str]) -> list[str]:
    """The URLs of a route with each value in the place of its ids, and 0 in the place of its numbers."""
    return list(dict.fromkeys(_filled(route.path, value) for value in values))


def _filled(path: str, value: str) -> str:
    path = re.sub(r"\{\w+:(int|float)\}", "0", path)
    path = re.sub(r"\{(step|number|n|index|item)\}", "0", path)
    return re.sub(r"\{\w+(:\w+)?\}", lambda _: value, path)


@dataclass
class Html(HTMLParser):
    """What a test asks of a page's HTML."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    named: set[int] = field(default_factory=set)
    """Which of ``tags`` are inside a label."""
    _labels: int = 0

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._labels:
            self.named.add(len(self.tags))
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._labels += tag == "label"

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, *names: str) -> Iterator[dict[str, str]]:
        """The attributes of every element of these kinds."""
        return (attributes for tag, attributes in self.tags if tag in names)


@functools.cache
def parsed(text: str) -> Html:
    """A page's HTML, for reading."""
    html = Html()
    html.feed(text)
    html.close()
    return html


def pages_of(client: TestClient) -> dict[str, str]:
    """URL -> HTML of every page that links lead to from the first one; of pages with a query, the first two."""
    waiting, found, queries = ["/"], dict[str, str](), Counter[str]()
    while waiting:
        url = waiting.pop(0)
        path, _, query = url.partition("?")
        queries[path] += bool(query)
        if url in found or queries[path] > 2:
            continue
        answer = client.get(url)
        found[url] = answer.text if answer.headers["content-type"].startswith("text/html") else ""
        links = [attributes.get("href", "") for attributes in parsed(found[url]).all("a")]
        waiting += [link.partition("#")[0] for link in links if link.startswith("/")]
    return {url: text for url, text in found.items() if text}
