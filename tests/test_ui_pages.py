"""Every page that links lead to: HTML that people and readers can use, in which the text of others is text."""

from __future__ import annotations

import re
from collections import Counter

import anyio
import pytest
from starlette.requests import Request

from k5train.ui.actions import COOKIE
from k5train.ui.app import create_app
from k5train.ui.early import early
from k5train.ui.listing import NotHere
from k5train.ui.project import Project
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
    with client_of(Project(tmp_path))[0] as client:
        pages = pages_of(client)
    assert "There are no pictures yet" in pages["/"]
    assert [*tmp_path.iterdir()] == []
    for url in ("/data", "/new", "/runs", "/compare", "/queue"):
        assert 'class="empty"' in pages[url], url


DOCUMENT = {"sec-fetch-dest": "document", "sec-fetch-mode": "navigate", "sec-fetch-site": "none"}
"""What a browser says when it opens a page."""


def test_a_browser_gets_the_same_page_in_two_parts(tmp_path):
    project = make_project(tmp_path / "project")
    with client_of(project)[0] as client:
        wanted = [url for url in pages_of(client) if "?" not in url]
        lengths = {}
        for url in wanted:
            whole, in_two = client.get(url), client.get(url, headers=DOCUMENT)
            assert (in_two.status_code, in_two.text) == (whole.status_code, whole.text), url
            assert in_two.headers["content-security-policy"] == whole.headers["content-security-policy"]
            lengths[url] = in_two.headers.get("content-length")
        assert client.get("/data/f/000000000000", headers=DOCUMENT).status_code == 404
        assert client.post("/new", headers=DOCUMENT).status_code == 403  # from nowhere
    early = {re.sub("[0-9a-f]{12}", "ID", url) for url, length in lengths.items() if length is None}
    assert early >= {"/", "/data", "/data/f/ID", "/data/c/ID", "/new", "/runs", "/runs/ID", "/compare"}


@pytest.mark.parametrize(
    ("error", "text", "is_bug"),
    [
        (NotHere("It is gone", "Choose another"), "It is gone", False),
        (PermissionError(13, "Permission denied", "runs"), "change its permissions", False),
        (OSError("of no kind"), "failed with an error of its own (OSError)", True),
        (ZeroDivisionError(), "failed with an error of its own (ZeroDivisionError)", True),
    ],
)
def test_the_top_of_a_page_is_sent_before_the_rest_is_known_and_an_error_stands_below_it(tmp_path, error, text, is_bug):
    parts: list[bytes] = []
    seen: list[int] = []

    def endpoint(request):
        seen.append(len(parts))
        raise error

    async def send(message):
        parts.append(message.get("body", b""))

    async def receive():
        raise AssertionError

    async def ask():
        page = create_app(Project(tmp_path))
        headers = [(b"sec-fetch-dest", b"document")]
        scope = {"type": "http", "method": "GET", "path": "/runs", "query_string": b"", "headers": headers, "app": page}
        response = await early("run_list.html", endpoint)(Request(scope))
        await response(scope, receive, send)

    if is_bug:
        with pytest.raises(type(error)):
            anyio.run(ask)
    else:
        anyio.run(ask)
    assert seen == [2]  # the head of the answer, and the top of the page
    _, top, rest = parts
    assert b"<title>Runs" in top
    assert top.rstrip().endswith(b"</header>")
    assert rest.startswith(b"<main")
    assert text in rest.decode()
    assert rest.endswith(b"</html>")


def test_what_an_action_did_is_said_once_to_a_browser_too(tmp_path):
    with client_of(Project(tmp_path))[0] as client:
        page = client.get("/runs", headers={**DOCUMENT, "cookie": f"{COOKIE}=saved"})
    assert "Saved." in page.text
    assert f'{COOKIE}=""; expires=' in page.headers["set-cookie"]
