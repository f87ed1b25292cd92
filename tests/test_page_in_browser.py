"""The page in a real browser: every page at three widths, light and dark, and whole ways through it by clicks alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from k5train.pictures.saved import save_pictures
from k5train.ui.ids import id_of
from k5train.ui.jobs import queue
from k5train.ui.project import open_project
from k5train.ui.runs.report import make_report
from tests.browser import SCHEMES, WIDTHS, browser, context_of, hard_to_read, wider_than_its_window
from tests.test_compare import DRAWN
from tests.test_compare import make as make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["browser"]  # the fixture
ROOT = Path(__file__).parent.parent


class Served:
    """``k5train ui`` over a folder, in a process of its own, as a user starts it."""

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.folder, self.model, self.port = folder, model, 0
        self.start()

    def start(self) -> None:
        """Start it, again on the port that it had."""
        command = [sys.executable, "-m", "k5train", "ui", "--port", str(self.port), "--folder", str(self.folder)]
        command += ["--model", str(self.model)] if self.model else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        self.process.send_signal(number)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """``serve(folder, model)``; what it started is ended after the test."""
    started: list[Served] = []

    def start(folder: Path, model: Path | None = None) -> Served:
        started.append(Served(folder, model))
        return started[-1]

    yield start
    for served in started:
        project = open_project(served.folder, None)
        for job in queue.jobs(project):  # also of a test that failed
            if job.state == "waiting":
                queue.remove(project, job.id)
            elif job.state == "running":
                queue.stop(project, job.id, at_once=True)
        if served.process.poll() is None:
            served.stop()


HOSTILE = (
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">",
    "</textarea></title></script><h1>out</h1> 'single' \"double\" `ticks` {{ 7 * 7 }} &amp;",
    "\x1b[31mred\x1b[0m \u202eright to left\u202c " + "a very long caption without an end " * 150,
    "onelongwordwithoutanyspace" * 40,
)
"""Captions, prompts and names that are text to the page."""


def fill(root: Path) -> None:
    """A project with pictures, and with runs as training leaves them, all of whose texts are hostile."""
    pictures = root / "datasets" / "cats <b>& dogs"
    pictures.mkdir(parents=True)
    for i, caption in enumerate(HOSTILE):
        Image.effect_noise((96, 64 + 16 * i), 40).convert("RGB").save(pictures / f"{i} <i>.png")
        (pictures / f"{i} <i>.txt").write_text(caption, encoding="utf-8")
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    for name, held_out in (("runs/first", (0.5, 0.4, 0.45)), ("runs/<u>second", (0.5, 0.45, 0.3))):
        run = make_run(root / name, held_out, ema=0.35)
        for step in (0, 2, 4):
            picture = Image.effect_noise((320, 192), 20 + step)
            save_pictures(run.samples(step), [picture] * 2, {**DRAWN, "prompts": list(HOSTILE[:2])})
    (root / "notes.toml").write_text("[train]\nsteps = 20  # </textarea><script>alert(1)</script>\n", encoding="utf-8")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("filled")
    fill(root)
    return root


def look_at(browser: Browser, url: str, *paths: str) -> list[str]:
    """What is wrong with these pages and one of each kind that links lead to, wide and narrow, light and dark."""
    problems: list[str] = []
    waiting, seen = ["/", *paths], set()
    with context_of(browser, url) as context:
        page = context.new_page()
        while waiting:
            path = waiting.pop(0)
            kind = re.sub(r"=[^&]*|[0-9a-f]{12}|[0-9]+", "", path)
            if kind in seen:
                continue
            seen.add(kind)
            answer = page.goto(url.rstrip("/") + path)
            assert answer is not None
            assert answer.status == 200, path
            waiting += page.eval_on_selector_all(
                "a[href^='/']:not([download])", "all => all.map(a => a.getAttribute('href').split('#')[0])"
            )
            waiting = [path for path in waiting if not re.search(r"/(pictures|files|static)/", path)]
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": WIDTHS[width]})
                problems += [f"{path} at {width} px: {wide}" for wide in wider_than_its_window(page)]
                for scheme in SCHEMES:
                    page.emulate_media(color_scheme=scheme)
                    problems += [f"{path} at {width} px, {scheme}: {poor}" for poor in hard_to_read(page)]
    return problems


def test_an_empty_project_can_be_read_at_every_width_light_and_dark(browser, serve, tmp_path):
    assert look_at(browser, serve(tmp_path).url) == []


def test_a_project_of_hostile_texts_can_be_read_and_they_stay_texts(browser, serve, filled):
    served = serve(filled)
    runs = "&".join(f"run={id_of(f'runs/{name}')}" for name in ("first", "<u>second"))
    assert look_at(browser, served.url, f"/compare?{runs}") == []


def test_what_two_tabs_save_is_not_lost_and_both_see_it(browser, serve, tmp_path):
    fill(tmp_path)
    served = serve(tmp_path)
    file = tmp_path / "datasets" / "cats <b>& dogs" / "1 <i>.txt"
    with context_of(browser, served.url, refused=("status of 409",)) as context:
        one, other = context.new_page(), context.new_page()
        for tab in (one, other):
            tab.goto(f"{served.url}data/f/{id_of('datasets/cats <b>& dogs')}")
            tab.locator(".grid .tile > a", has=tab.get_by_alt_text(HOSTILE[1][:20])).click()
            assert tab.locator("#caption").input_value() == HOSTILE[1]
        one.locator("#caption").fill("by the first tab")
        one.get_by_role("button", name="Save", exact=True).click()
        one.get_by_text("Saved", exact=True).wait_for()
        other.locator("#caption").fill("by the second tab")
        other.get_by_role("button", name="Save", exact=True).click()
        other.locator("#caption-card .error").wait_for()
        assert other.locator("#caption").input_value() == "by the second tab"
        other.locator("#caption-card").get_by_text("by the first tab").wait_for()
        assert file.read_text(encoding="utf-8").strip() == "by the first tab"
        other.get_by_role("button", name="Save", exact=True).click()  # knowing what is there, it is taken
        other.get_by_text("Saved", exact=True).wait_for()
        assert file.read_text(encoding="utf-8").strip() == "by the second tab"


def test_a_run_that_is_deleted_while_it_is_shown_is_said_to_be_gone(browser, serve, tmp_path):
    fill(tmp_path)
    served = serve(tmp_path)
    # A browser that asks once more for what is live, or for a lazy picture, learns that it is gone.
    with context_of(browser, served.url, refused=("404 (Not Found)",)) as context:
        page = context.new_page()
        page.goto(f"{served.url}runs/{id_of('runs/first')}")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").first.click()
        assert Path(download.value.path()).read_bytes() == (tmp_path / "runs/first/first.safetensors").read_bytes()
        slider = page.get_by_label("Step of the pictures").first
        slider.focus()
        page.keyboard.press("Home")
        assert slider.get_attribute("aria-valuetext") == "Step 2"
        shutil.rmtree(tmp_path / "runs" / "first")
        page.locator("#problem p").first.wait_for()
        page.get_by_label("Views").get_by_role("link", name="Runs", exact=True).click()
        page.get_by_role("link", name="<u>second").first.wait_for()
        assert page.get_by_role("link", name="first", exact=True).count() == 0


def test_the_keyboard_alone_gets_everywhere(browser, serve, tmp_path):
    fill(tmp_path)
    served = serve(tmp_path)

    def focus(page: Page, name: str) -> None:
        """Press Tab until an element of this name has the focus, and can be seen to have it."""
        for _ in range(60):
            page.keyboard.press("Tab")
            said = page.evaluate(
                "() => [document.activeElement].map(e => e.labels?.[0]?.innerText || e.innerText || e.ariaLabel)[0]"
            )
            if name in (said or ""):
                outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", name
                return
        raise AssertionError(f"Tab does not come to {name!r}")

    with context_of(browser, served.url) as context:
        page = context.new_page()
        page.goto(served.url)
        focus(page, "Skip to the content")
        focus(page, "Data")
        page.keyboard.press("Enter")
        page.wait_for_url("**/data")
        focus(page, "New folder")
        page.keyboard.type("dogs")
        page.keyboard.press("Enter")
        page.wait_for_url("**/data/f/*")
        assert (tmp_path / "datasets" / "dogs").is_dir()
        page.goto(f"{served.url}data/f/{id_of('datasets/cats <b>& dogs')}")
        page.locator(".grid .tile > a").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.locator("#caption").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("typed")
        page.keyboard.press("Control+Enter")
        page.get_by_text("Saved", exact=True).wait_for()


def test_a_report_is_read_from_a_file_and_asks_nobody(browser, filled, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(
        make_report([filled / "runs" / "first", filled / "runs" / "<u>second"], 10**7).html, encoding="utf-8"
    )
    for width, scheme in ((1280, "light"), (390, "dark")):
        with context_of(browser, file.as_uri(), width, scheme) as context:
            page = context.new_page()
            page.goto(file.as_uri())
            assert wider_than_its_window(page) == []
            assert hard_to_read(page) == []
            sizes = page.eval_on_selector_all("img", "all => all.map(i => i.complete ? i.naturalWidth : 0)")
            assert len(sizes) >= 12
            slider = page.get_by_label("Step of the pictures").first
            shown = slider.get_attribute("aria-valuetext")
            slider.focus()
            page.keyboard.press("ArrowLeft")
            assert slider.get_attribute("aria-valuetext") != shown
