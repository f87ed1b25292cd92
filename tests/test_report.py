"""A report: one file that loads nothing, shows what the runs' files say, and stays within its size."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from k5cache.shared.errors import OutputError
from k5train.cli import app
from k5train.pictures import saved
from k5train.pictures.saved import save_pictures
from k5train.ui.runs import report_pictures
from k5train.ui.runs.report import BEGINS, make_report
from tests.cli import Cli
from tests.test_compare import DRAWN, make

LOADED = {
    "src",
    "srcset",
    "href",
    "data",
    "action",
    "formaction",
    "poster",
    "background",
    "xlink:href",
    "ping",
    "style",
}


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: dict[str, str] = {}
        self.policy = self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.sources += [value or "" for name, value in attributes if name in LOADED]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def pictures(page: Page) -> list[Image.Image]:
    sources = [source for source in page.sources if source.startswith("data:image/")]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs with pictures at three steps."""
    noise = Image.effect_noise((320, 192), 40)
    for name in ("good", "other"):
        run = make(tmp_path / name)
        for step in (0, 2, 4):
            save_pictures(run.samples(step), [noise] * 2, DRAWN)
    return tmp_path


def test_a_report_is_one_file_that_loads_nothing_and_obeys_only_its_own_style_and_script(runs):
    made = make_report([runs / "good", runs / "other"])
    page = Page(made.html)
    assert made.html.encode().startswith(BEGINS)
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    hashes = {tag: f"'sha256-{base64.b64encode(hashlib.sha256(page.texts[tag].encode()).digest()).decode()}'"
              for tag in ("style", "script")}  # fmt: skip
    assert page.policy == (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; script-src {hashes['script']}; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"@import|url\(|https?:", page.texts["style"] + page.texts["script"])
    assert {"link", "iframe", "object", "embed", "form", "base"}.isdisjoint(page.tags)
    assert (page.tags.count("style"), page.tags.count("script")) == (1, 1)
    assert {picture.size for picture in pictures(page)} == {(320, 192)}
    assert (made.num_runs, made.said) == (2, "")
    assert made == make_report([runs / "good", runs / "other"])  # the same bytes each time


def test_pictures_become_smaller_and_then_fewer_to_stay_within_the_size_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report_pictures, "SIDES", (128, 64, 32))
    monkeypatch.setattr(report_pictures, "LEAST_SIDES", (16,))
    run = make(tmp_path / "run", (0.5, 0.4, 0.4, 0.4))
    noise = Image.effect_noise((128, 128), 60)
    for step in (0, 2, 4, 6):
        save_pictures(run.samples(step), [noise] * 2, DRAWN)
    whole = make_report([run.root])
    assert (whole.said, {p.size for p in pictures(Page(whole.html))}) == ("", {(128, 128)})
    bare = len(make_report([make(tmp_path / "bare", (0.5, 0.4, 0.4, 0.4), seed=None).root]).html)
    smaller = make_report([run.root], bare + 80_000)
    sizes = {picture.size for picture in pictures(Page(smaller.html))}
    assert sizes == {(64, 64)}
    assert smaller.said.endswith(" KiB, its pictures are reduced to 64 pixels")
    assert smaller.said in Page(smaller.html).texts["p"]
    fewer = make_report([run.root], bare + 8_000)
    assert "of 3 steps with pictures it shows 1 and its pictures are reduced to 32 pixels" in fewer.said
    none = make_report([run.root], bare + 1_500)
    assert "of 3 steps with pictures it shows none" in none.said
    assert not pictures(Page(none.html))
    for made, most in ((smaller, bare + 80_000), (fewer, bare + 8_000), (none, bare + 1_500)):
        assert len(made.html.encode()) <= most
    with pytest.raises(OutputError, match="without any picture, which is more than --max-size"):
        make_report([run.root], 20_000)


def test_one_run_is_shown_whole_and_several_are_compared_with_each_of_them_folded(runs):
    one = make_report([runs / "good"]).html
    assert "Which is best?" not in one
    assert "train.validation.split" in one  # a setting that is not its default
    assert re.search(r"<h2>good</h2>.*Finished after 4 steps.*0\.4000 at step 2", one, re.DOTALL)
    two = make_report([runs / "good", runs / "other"]).html
    assert "Which is best?" in two
    assert re.findall(r'<details class="fold one-run"><summary>(\w+)', two) == ["good", "other"]


def test_a_picture_that_is_gone_costs_only_itself(runs):
    (runs / "good" / "samples" / "step-000004" / "01.png").write_bytes(b"no picture")
    (runs / "other" / "samples" / "step-000002" / "00.png").unlink()
    page = Page(make_report([runs / "good", runs / "other"]).html)
    assert page.sources.count("data:,") == 2
    assert report_pictures.fitting({}, 0) == ({}, report_pictures.SIDES[0])


def test_a_picture_that_is_no_png_is_not_given_to_other_programs(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    asked: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    path = tmp_path / "00.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    assert report_pictures.source_of(path, 100) == report_pictures.MISSING
    assert saved._read(path, None) is None
    assert asked == []


def test_names_and_prompts_are_text_and_credentials_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    hostile = "<script>alert(1)</script></textarea>\"'\x1b[31m hf_abcdefghijklmnop 0123456789abcdef0123"
    run = make(tmp_path / "<img src=x onerror=alert(1)>", seed=None)
    for step in (0, 4):
        save_pictures(run.samples(step), [Image.new("RGB", (16, 16))], {**DRAWN, "prompts": [hostile]})
    html = make_report([run.root]).html
    page = Page(html)
    assert page.tags.count("script") == 1
    assert all(source.startswith("data:image/jpeg") for source in page.sources)
    assert not re.search(r"hf_abc|0123456789abcdef0123|\x1b|<script>alert", html)
    assert html.count("(hidden)") > 1


@pytest.mark.parametrize("kind", ["stopped", "bare", "damaged", "no steps"])
def test_every_kind_of_run_has_a_report(tmp_path, kind):
    run = make(tmp_path / "run", () if kind == "no steps" else (0.5, 0.4), is_finished=kind != "stopped",
               seed=None if kind == "bare" else 42)  # fmt: skip
    if kind == "damaged":
        run.metrics.write_bytes(b"{\n")
        (run.root / "recipe.toml").write_text("?")
    page = Page(make_report([run.root]).html)
    assert page.texts["h1"] == "run"
    assert ("img" in page.tags) == (kind != "bare")


def test_the_command_writes_a_new_file_says_how_to_open_it_and_replaces_only_reports(runs):
    cli = Cli(runs)
    first = cli(app, "report", "good")
    assert (first.code, first.err) == (0, "")
    assert re.fullmatch(
        r"Wrote good\.html: 1 run, 6 pictures, [\d.]+ KiB\nOpen it in a browser, or send it: file:///.*/good\.html\n",
        first.out,
    )
    assert "Wrote good-2.html" in cli(app, "report", "good").out
    assert "Wrote compare.html: 2 runs" in cli(app, "report", "good", "other").out
    assert cli(app, "report", "good", "-o", "good.html").code == 0
    small = cli(app, "report", "good", "-o", "deep/small.html", "--max-size", "0.06")
    assert (small.code, "To keep this report within" in small.err) == (0, True)
    assert (runs / "deep" / "small.html").stat().st_size < 0.06 * 2**20
    (runs / "mine.html").write_text("mine")
    refused = cli(app, "report", "good", "-o", "mine.html")
    assert (refused.code, (runs / "mine.html").read_text()) == (2, "mine")
