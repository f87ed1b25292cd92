"""From an empty folder to a trained LoRA by clicks alone, in a real browser, and what may go wrong on the way."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from k5train.runs.folder import Run
from k5train.runs.metrics import read_metrics
from k5train.ui.ids import id_of
from tests.browser import browser, context_of
from tests.test_page_in_browser import serve

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

__all__ = ["browser", "serve"]  # the fixtures
STEPS = 5000  # more than are trained before it is stopped
SMALL = {
    "train.lora.rank": "2",
    "train.lora.targets": "qkv",
    "train.base_model_precision": "no_change",
    "train.validation.prompts": "a fox on a sofa",
    "train.validation.every": "0",  # pictures come before the first step, and when they are asked for
    "train.checkpoint_every": "5",
    "train.validation.split": "0.34",
}
"""Options of a run that takes a tenth of a second a step."""
KILLED = ("ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_REFUSED")
"""What a browser says of a page whose server was killed."""
LONG = 240_000.0
"""Milliseconds for an encode or a run of the toy on a busy machine: it takes 15 s to import what it needs."""


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def drop(page: Page, *files: tuple[str, bytes]) -> None:
    """Drop files onto the page, as from a file manager."""
    carried = page.evaluate_handle(
        """files => {
            const carried = new DataTransfer()
            for (const [name, data] of files)
                carried.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name))
            return carried
        }""",
        [[name, base64.b64encode(data).decode()] for name, data in files],
    )
    page.dispatch_event("main", "drop", {"dataTransfer": carried})


def go(page: Page, view: str) -> None:
    page.get_by_label("Views").get_by_role("link", name=view, exact=True).click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).first.click()


def put(page: Page, option: str, value: str) -> Locator:
    """Write an option into the form of a new run; returns its box."""
    box = page.locator(f'[data-option="{option}"]').first
    control = box.locator("input, textarea, select").first
    control.select_option(value) if control.evaluate("e => e.tagName") == "SELECT" else control.fill(value)
    return box


@pytest.mark.slow
def test_from_an_empty_folder_to_a_lora(browser, serve, tmp_path, toy_model):
    served = serve(tmp_path, toy_model)
    with context_of(browser, served.url, refused=KILLED) as context:
        page = context.new_page()
        page.goto(served.url)
        go(page, "Data")
        page.get_by_label("New folder").fill("cats")
        press(page, "Make it")
        page.get_by_label(re.compile("or choose them")).set_input_files(
            [{"name": f"{i}.png", "mimeType": "image/png", "buffer": picture(i)} for i in range(2)]
        )
        press(page, "Add")
        page.get_by_text("1.png").first.wait_for()
        drop(page, ("2.png", picture(2)), ("2.txt", b"a third cat"))
        page.get_by_text("a third cat").wait_for()
        assert sorted(path.name for path in (tmp_path / "datasets" / "cats").iterdir()) == [
            "0.png", "1.png", "2.png", "2.txt"]  # fmt: skip
        # A caption, and one that another program has changed meanwhile.
        page.locator(".tile").get_by_text("0.png", exact=True).click()  # the words of a tile lead there too
        page.get_by_text("Left out: missing caption").wait_for()
        caption = page.locator("#caption")
        caption.fill("a first cat <script>")
        press(page, "Save")
        page.get_by_text("Saved", exact=True).wait_for()
        assert page.get_by_text("left out").count() == 0  # in any case: what the caption changes is shown as it is now
        assert (tmp_path / "datasets" / "cats" / "0.txt").read_text(encoding="utf-8").strip() == "a first cat <script>"
        page.keyboard.press("Escape")
        page.get_by_role("link", name="Next").click()
        page.locator("#caption").fill("a second cat")
        page.locator("#caption").press("Control+Enter")
        page.get_by_text("Saved", exact=True).wait_for()
        page.get_by_role("link", name="cats", exact=True).click()
        # The cache: with a trigger, in a small size, and its progress.
        page.locator("#options > summary").click()
        page.get_by_label("Trigger").fill("sks")
        page.get_by_label("Resolution").fill("64")
        press(page, "Encode")
        page.locator("#job .badge", has_text="running").wait_for()
        page.locator("#job .badge", has_text="finished").wait_for(timeout=LONG)
        page.reload()
        page.get_by_role("link", name="cache/cats").first.click()
        page.get_by_text("sks, a first cat <script>").wait_for()
        # A run that is to be stopped, from a recipe with an error that is mended, with a picture to draw.
        page.get_by_role("link", name="Train a LoRA on it").click()
        put(page, "train.steps", "many")
        problem = page.locator(problem_of("train.steps"))
        problem.wait_for()
        assert problem.inner_text() == "must be a whole number, found 'many'"
        put(page, "train.steps", str(STEPS))
        problem.wait_for(state="hidden")
        for option, value in SMALL.items():
            put(page, option, value)
        page.get_by_text("1 prompt is not in cache/cats yet").wait_for()
        page.locator("#plan", has_text="GiB").wait_for(timeout=LONG)
        page.get_by_label("Name of the run").fill("first")
        # Another one is written in a tab of its own before the first starts: what trains meanwhile takes a core.
        other = context.new_page()
        other.goto(served.url)
        go(other, "New run")
        other.get_by_role("link", name=re.compile("^Defaults")).click()
        other.get_by_role("checkbox", name="cats", exact=True).check()
        for option, value in {**SMALL, "train.steps": "2", "train.validation.prompts": ""}.items():
            put(other, option, value)
        other.get_by_label("Name of the run").fill("second")
        other.locator("#said", has_text="no problems").wait_for()
        press(page, "Start")
        page.get_by_role("heading", name="run first").wait_for()
        # Another waits for it.
        press(other, "Start")
        other.wait_for_url("**/jobs/*")
        other.close()
        go(page, "Queue")
        page.locator("#queue-jobs", has_text="run second").wait_for()
        # The page is killed in mid-run, and finds the run again.
        bar = page.locator("#queue-bars progress").first
        page.locator("#queue-bars", has_text="run first").wait_for(timeout=LONG)
        step = wait_for_more(bar, 0)
        served.kill()
        served.start()
        page.reload()
        wait_for_more(bar, step)
        # The run's page: a picture out of turn, a stop that saves, and on from there.
        go(page, "Runs")
        page.get_by_role("link", name="first", exact=True).first.click()
        press(page, "Sample now")
        page.locator("#run-pictures figure", has_text="with the LoRA").first.wait_for(state="attached", timeout=LONG)
        press(page, "Stop and save")
        head = page.locator("#run-head")
        head.get_by_text("stopped", exact=True).wait_for(timeout=LONG)
        stopped_at = last_step(tmp_path / "runs" / "first")
        press(page, "Resume")
        page.wait_for_url("**/jobs/*")
        go(page, "Queue")
        page.locator("#queue-jobs tr", has_text="run second").get_by_text("finished").wait_for(timeout=LONG)
        page.goto(f"{served.url}runs/{id_of('runs/second')}")
        head.get_by_text("finished", exact=True).wait_for(timeout=LONG)
        with page.expect_download() as download:
            page.locator("#run-files").get_by_role("link", name="Download").first.click()
        lora = Run(tmp_path / "runs" / "second").lora
        assert Path(download.value.path()).read_bytes() == lora.read_bytes()
        assert download.value.suggested_filename == lora.name
        page.goto(f"{served.url}runs/{id_of('runs/first')}")
        head.get_by_text("running", exact=True).wait_for(timeout=LONG)
        wait_for_more(head.locator("progress"), stopped_at / STEPS)
        press(page, "Stop and save")
        head.get_by_text("stopped", exact=True).wait_for(timeout=LONG)
        steps = [row["step"] for row in read_metrics(tmp_path / "runs" / "first" / "metrics.jsonl") if "loss" in row]
        assert steps == list(range(1, steps[-1] + 1))
        # Both side by side.
        go(page, "Compare")
        for name in ("first", "second"):
            page.get_by_role("checkbox", name=re.compile(name)).check()
        page.get_by_role("button", name=re.compile("Compare")).first.click()
        page.get_by_role("heading", name="2 runs compared").wait_for()


def last_step(run: Path) -> int:
    return read_metrics(run / "metrics.jsonl")[-1]["step"]


def wait_for_more(bar: Locator, than: float) -> float:
    """Wait until a bar has come further; returns how far."""
    bar.wait_for(timeout=LONG)
    for _ in range(int(LONG / 100)):
        value = bar.evaluate("bar => bar.value")
        if value > than:
            return value
        bar.page.wait_for_timeout(100)
    raise AssertionError(f"the bar stays at {than}")


def problem_of(option: str) -> str:
    return f'[id="o.{option}.problem"]'
