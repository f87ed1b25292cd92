"""A real browser: Debian's Chromium, driven by Playwright, for tests of the page and for pictures of it.

    python -m tests.browser http://127.0.0.1:8001/ http://127.0.0.1:8001/runs build/pictures

writes each URL at 390, 1280 and 2560 px, light and dark, and says what is wrong with it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
WIDTHS = {390: 844, 1280: 800, 2560: 1440}
"""A phone, a laptop and a large screen, each with its height."""
SCHEMES = ("light", "dark")
SECONDS = 20.0
"""How long a test waits for what should be there in a moment, on a busy machine."""


def missing() -> str | None:
    """What has to be installed before a browser can be started; None if nothing."""
    lacks = []
    if find_spec("playwright") is None:
        lacks.append("pip install -e '.[test]'")
    if not executable():
        lacks.append("apt-get install --no-install-recommends chromium")
    return f"no browser to test the page with; to install one: {' and '.join(lacks)}" if lacks else None


@functools.cache
def executable() -> str | None:
    """Chromium, if it starts: Ubuntu has a command of its name that only tells how to install it."""
    for name in NAMES:
        if path := shutil.which(name):
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run([path, "--version"], capture_output=True, timeout=SECONDS, check=True)
                return path
    return None


@contextmanager
def started() -> Iterator[Browser]:
    """The browser, until the block ends: while it runs, no other event loop can run in this thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, as which CI runs.
        is_root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=executable(), chromium_sandbox=not is_root)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a file, which import this fixture. They are skipped where there is none."""
    if reason := missing():
        pytest.skip(reason)
    with started() as running:
        yield running


@dataclass
class Watch:
    """What a test must not see: errors on the console, violations of the policy, requests to anybody else."""

    origin: str
    refused: tuple[str, ...] = ()
    """What the console may tell of: a test that asks for what is refused, or that ends the server."""
    problems: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        """Watch every page of a context from now on."""
        context.on("page", self._page)

    def _page(self, page: Page) -> None:
        page.on("console", lambda said: self._note(page, said.text) if said.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: (self._note(page, f"asked: {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self._note(page, str(error)))
        page.on("request", lambda request: None if self._is_ours(request.url) else self._note(page, request.url))

    def _is_ours(self, url: str) -> bool:
        return url.startswith((self.origin, "data:", "blob:", "about:"))

    def _note(self, page: Page, problem: str) -> None:
        if any(words in problem for words in self.refused):
            return
        self.problems.append(f"{page.url}: {problem}")


@contextmanager
def context_of(
    browser: Browser, origin: str, width: int = 1280, scheme: str = "light", refused: tuple[str, ...] = ()
) -> Iterator[BrowserContext]:
    """Tabs that share their cookies. At its end nothing may have gone wrong in any of them.

    Args:
        origin: the beginning of all URLs that may be asked for.
        refused: words of problems that the test makes itself.
    """
    height = WIDTHS.get(width, 800)
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,  # type: ignore[arg-type]
        reduced_motion="reduce",
        accept_downloads=True,
    )
    context.set_default_timeout(SECONDS * 1000)
    watch = Watch(origin, refused)
    watch.over(context)
    try:
        yield context
    except BaseException:
        for page in context.pages:  # what a person would have seen, for the report of the failed test
            print(page.url, page.locator("body").inner_text(timeout=1000)[:3000], sep="\n")
        raise
    finally:
        context.close()
    assert not watch.problems, "\n".join(watch.problems)


def wider_than_its_window(page: Page) -> list[str]:
    """The elements that make a page scroll sideways; the page itself is last."""
    return page.evaluate("""() => {
        const root = document.documentElement
        if (root.scrollWidth <= root.clientWidth) return []
        const wide = [...document.body.querySelectorAll('*')].filter(
            e => e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest('.table-scroll, pre'))
        return [...wide.slice(-5).map(e => e.outerHTML.slice(0, 90)), `${root.scrollWidth} px`]
    }""")


# In the browser: WCAG's contrast of every text that can be seen, against the backgrounds below it.
CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
    const rgba = colour => {
        canvas.clearRect(0, 0, 1, 1)
        canvas.fillStyle = colour
        canvas.fillRect(0, 0, 1, 1)
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data
        return [r, g, b, a / 255]
    }
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1)
    const light = c => {
        const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const behind = element => {
        const layers = []
        for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor))
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1])
    }
    const poor = []
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement
        const said = walker.currentNode.data.trim()
        if (!said || !element.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue
        if (element.closest('svg, :disabled, option')) continue
        const ground = behind(element), ink = over(rgba(getComputedStyle(element).color), ground)
        const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x)
        const ratio = (a + 0.05) / (b + 0.05)
        if (ratio < 4.5) poor.push(`${ratio.toFixed(1)}: ${said.slice(0, 60)} (${element.outerHTML.slice(0, 60)})`)
    }
    return poor
}"""


def hard_to_read(page: Page) -> list[str]:
    """Texts whose contrast is below 4.5, which is WCAG's AA for text of any size. Disabled controls may be pale."""
    return page.evaluate(CONTRAST)


def take_pictures(urls: list[str], folder: Path) -> list[str]:
    """Write each URL at every width, light and dark; returns what is wrong with them."""
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with started() as browser:
        for scheme in SCHEMES:
            for width in WIDTHS:
                for url in urls:
                    at, parts = f"{url} at {width} px, {scheme}", urlsplit(url)
                    try:
                        with context_of(browser, f"{parts.scheme}://{parts.netloc}", width, scheme) as context:
                            page = context.new_page()
                            page.goto(url, wait_until="load")
                            page.wait_for_timeout(300)  # what comes by events
                            name = re.sub(r"\W+", "-", re.sub(r"^\w+://[^/]*/?|^.*/", "", url)).strip("-") or "index"
                            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
                            problems += [f"{at}: scrolls sideways: {wide}" for wide in wider_than_its_window(page)]
                            problems += [f"{at}: contrast {poor}" for poor in hard_to_read(page)]
                    except AssertionError as error:
                        problems.append(f"{at}: {error}")
    return problems


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("python -m tests.browser URL... FOLDER")
    if without := missing():
        sys.exit(without)
    *pages, into = sys.argv[1:]
    print("\n".join(take_pictures(pages, Path(into))) or f"nothing is wrong; pictures are in {into}")
