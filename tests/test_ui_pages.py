"""Every page that links lead to: HTML that people and readers can use, in which the text of others is text."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.ui_project import NASTY, client_of, make_project, pages_of, parsed


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """URL -> HTML."""
    project = make_project(tmp_path_factory.mktemp("pages") / "project")
    with client_of(project)[0] as client:
        return pages_of(client)


def test_every_link_in_the_navigation_leads_to_a_page(pages):
    assert not [url for url, text in pages.items() if "<h1>Something went wrong" in text]
    named = ("/", "/data", "/new", "/runs", "/compare", "/queue")
    assert not [url for url in named if url not in pages or "<h1>Not here" in pages[url]]
    assert len(pages) > len(named)


def test_no_page_has_a_script_or_style_in_it_or_anything_from_elsewhere(pages):
    for url, text in pages.items():
        html = parsed(text)
        for script in html.all("script"):
            assert re.fullmatch(r"/static/\w+\.js\?v=[0-9a-f]{12}", script["src"]), url
        assert not [*html.all("style", "iframe", "object", "embed", "base")], url
        for _, attributes in html.tags:
            assert not [name for name in attributes if name == "style" or name.startswith("on")], (url, attributes)
            for name in ("src", "href", "action", "formaction", "data-live"):
                assert re.match(r"(/(?!/)|#|\?|data:image/|$)", attributes.get(name, "")), (url, attributes)


def test_the_text_of_others_is_text(pages):
    assert any("&lt;script&gt;alert(1)" in text for text in pages.values())
    for url, text in pages.items():
        assert "<script>alert" not in text, url
        assert not re.search("cats <b>|two <i>|still <u>", text), url  # names of a folder, a picture and a run
        assert NASTY[-5:] not in re.sub(r"<textarea.*?</textarea>", "", text, flags=re.DOTALL), url  # ESC


def test_everything_has_a_name_that_a_reader_can_say(pages):
    for url, text in pages.items():
        html = parsed(text)
        assert len([*html.all("h1")]) == 1, url
        assert next(html.all("html"))["lang"] == "en"
        assert not [name for name, n in Counter(a["id"] for _, a in html.tags if "id" in a).items() if n > 1], url
        for image in html.all("img"):
            assert "alt" in image, (url, image)
        labels = {label.get("for") for label in html.all("label")}
        for number, (tag, attributes) in enumerate(html.tags):
            if tag in ("input", "select", "textarea") and attributes.get("type") not in ("hidden", "submit"):
                is_named = attributes.get("id") in labels or number in html.named or "aria-label" in attributes
                assert is_named or "aria-labelledby" in attributes, (url, attributes)
            if "data-live" in attributes:
                assert attributes.get("id"), (url, attributes)
        for form in html.all("form"):
            assert form.get("method", "get").lower() in ("get", "post", "dialog"), url


def test_the_page_before_anything_is_there_says_the_first_step(tmp_path):
    from k5train.ui.project import Project

    with client_of(Project(tmp_path))[0] as client:
        pages = pages_of(client)
    assert "There are no pictures yet" in pages["/"]
    assert [*tmp_path.iterdir()] == []
    for url in ("/data", "/new", "/runs", "/compare", "/queue"):
        assert 'class="empty"' in pages[url], url
