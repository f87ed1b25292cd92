"""The holes of other trainers' pages, tried on every route of the app: also on those that are added later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from k5train.ui import guard
from k5train.ui.guard import Access
from k5train.ui.ids import id_of
from k5train.ui.project import Project
from tests.ui_project import BASE, ORIGIN, SECRET, client_of, ids, make_project, urls, without_processes

TOKEN = "a-token-of-32-characters-or-more"
LOCAL = Access()
OPEN = Access(frozenset({"127.0.0.1", "box"}), is_any_address=True, token=TOKEN)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Project]:
    with without_processes():
        yield make_project(tmp_path_factory.mktemp("guard") / "project")


@pytest.fixture(scope="module")
def local(project) -> Iterator[tuple[TestClient, list[Route]]]:
    client, page = client_of(project)
    with client:
        yield client, page.routes


@pytest.fixture(scope="module")
def remote(project) -> Iterator[tuple[TestClient, list[Route]]]:
    client, page = client_of(project, OPEN)
    with client:
        yield client, page.routes


def first_urls(routes: list[Route], project) -> list[tuple[str, str]]:
    """(method, URL) of each route and method, with an id that is there."""
    first = ids(project)[:1]
    return [
        (method, url) for route in routes for method in sorted(route.methods - {"HEAD"}) for url in urls(route, first)
    ]


def tree(root: Path) -> dict[str, object]:
    """Every file of a project with its content, and every folder; without thumbnails, which may be deleted."""
    found: dict[str, object] = {}
    for folder, folders, names in os.walk(root):
        if Path(folder).name == "thumbnails":
            folders.clear()
            continue
        for name in names:
            path = Path(folder) / name
            found[str(path)] = (path.lstat().st_mtime_ns, "" if path.is_symlink() else _hash(path))
        found[folder] = sorted(set(folders) - {"thumbnails"})
    return found


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_route_answers_to_another_host(local, project):
    client, routes = local
    others = [
        "evil.example", "evil.example:8001", "127.0.0.1.evil.example", "127.0.0.1:8001:80", "127.0.0.1@evil.example",
        "[::1", "::1", "192.168.0.7", "localhost.", "", "localhost:0", "localhost:65536", "localhost:٣", "a b",
    ]  # fmt: skip
    for method, url in first_urls(routes, project):
        answer = client.request(
            method, url, headers={"host": "evil.example:8001", "origin": "http://evil.example:8001"}
        )
        assert answer.status_code == 403, (method, url)
    for host in others:
        assert client.get("/", headers={"host": host.encode()}).status_code == 403, host
    assert guard.check_host(guard.Headers(raw=[]), LOCAL)
    assert guard.check_host(guard.Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")]), LOCAL)
    for host in ("127.0.0.1:8001", "localhost", "LOCALHOST:9000", "[::1]:8001"):
        assert client.get("/", headers={"host": host}).status_code == 200, host


def test_no_route_changes_anything_for_another_site(local, project):
    client, routes = local
    posts = [url for method, url in first_urls(routes, project) if method == "POST"]
    foreign = [
        {}, {"origin": "null"}, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:3000"},
        {"origin": BASE + ".evil.example"}, {"origin": "file://"}, ORIGIN | {"sec-fetch-site": "cross-site"},
        ORIGIN | {"sec-fetch-site": "same-site"},
    ]  # fmt: skip
    before = tree(project.root)
    for url in posts or ["/"]:
        for headers in foreign:
            assert client.post(url, headers=headers, data={}).status_code == 403, (url, headers)
    assert tree(project.root) == before
    assert client.post("/", headers=ORIGIN | {"sec-fetch-site": "same-origin"}).status_code == 405  # it came to the app


def test_no_route_is_read_by_another_site_except_by_a_link_to_it(local, project):
    client, routes = local
    for method, url in first_urls(routes, project):
        for site in ("cross-site", "same-site"):
            headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
            assert client.request(method, url, headers=headers).status_code == 403, (method, url)
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert client.request(method, "/", headers=ORIGIN).status_code == 405, method


def test_every_route_asks_for_the_token_and_shows_nothing_without_it(remote, project):
    client, routes = remote
    cookie = f"{OPEN.cookie}={TOKEN}"
    wrong = [
        "",
        f"{OPEN.cookie}=",
        f"{OPEN.cookie}={TOKEN[:-1]}",
        f"{OPEN.cookie}={TOKEN}x",
        f"other={TOKEN}",
        "\xff=;;=",
    ]
    for method, url in first_urls(routes, project):
        for value in wrong if url == "/" else wrong[-1:]:
            answer = client.request(method, url, headers=ORIGIN | {"cookie": value.encode("latin-1")})
            assert (answer.status_code, "k5_notice" in answer.text) == (401, False), (method, url, value)
        assert "A token is needed" in answer.text
        assert project.name not in answer.text
        if method == "POST":
            assert client.post(f"{url}?token={TOKEN}", headers=ORIGIN).status_code == 401
        else:
            assert client.get(url, headers={"cookie": cookie}).status_code not in (401, 403), url
    assert client.get("/", headers={"cookie": cookie, "host": "evil.example"}).status_code == 403


def test_the_token_goes_from_the_url_into_a_cookie_that_other_sites_cannot_use(remote):
    client, _ = remote
    answer = client.get(f"/runs?sort=name&token={TOKEN}", headers={"host": "10.1.2.3:8001"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs?sort=name")
    assert answer.headers["set-cookie"].lower() == f"{OPEN.cookie}={TOKEN}; httponly; path=/; samesite=strict"
    client.cookies.clear()
    assert client.get(f"{BASE}//evil.example/?token={TOKEN}").headers["location"] == "/evil.example/"
    client.cookies.clear()
    for query in (f"token={TOKEN}x", f"token={TOKEN}&token={TOKEN}", "token=", f"Token={TOKEN}"):
        assert client.get(f"/?{query}").status_code == 401, query


def test_no_page_picture_file_or_stream_writes_anything(local, project):
    client, routes = local
    before, known = tree(project.root), ids(project)
    for route in routes:
        if "GET" in route.methods:
            for url in urls(route, known):
                answer = client.get(url)
                assert answer.status_code < 500, (url, answer.text)
                assert SECRET not in answer.text, url
    assert tree(project.root) == before


def test_no_id_is_a_path(local, project):
    client, routes = local
    hostile = [
        "%2e%2e", "..%2f..%2fetc%2fpasswd", "a%00b", "%ff%fe", "good", "A" * 5000, id_of("datasets/../runs/good"),
        *(id_of(f"{place}/leads-out") for place in ("datasets", "cache", "runs", "sweeps")),
    ]  # fmt: skip
    before = tree(project.root)
    for route in routes:
        for method in route.methods - {"HEAD"} if "{" in route.path else ():
            for url in urls(route, hostile):
                answer = client.request(method, url, headers=ORIGIN)
                assert answer.status_code in (303, 400, 404, 405, 413, 422), (method, url, answer.status_code)
                assert answer.status_code != 303 or method == "POST", url
                assert SECRET not in answer.text, url
                assert "root:" not in answer.text, url
    assert tree(project.root) == before


def test_every_answer_has_the_headers_also_to_errors(local, remote, project, monkeypatch):
    client, routes = local
    answers = [client.request(method, url) for method, url in first_urls(routes, project)]
    answers += [client.get("/nosuch"), client.get("/", headers={"host": "evil"}), remote[0].get("/"), client.put("/")]
    assert {answer.status_code for answer in answers} >= {200, 401, 403, 404, 405}
    monkeypatch.setattr("k5train.ui.overview_pages.project_of", lambda request: 1 / 0)
    with client_of(project)[0] as failing:
        answers.append(failing.get("/"))
    assert answers[-1].status_code == 500
    assert "Traceback" not in answers[-1].text
    assert "ZeroDivisionError" in answers[-1].text
    for answer in answers:
        assert {name: answer.headers.get(name) for name in guard.HEADERS} == guard.HEADERS, answer.url
        assert "cache-control" in answer.headers
    assert "'unsafe" not in guard.POLICY


def test_what_is_sent_is_bounded(local, project):
    client, routes = local
    boundary = {"content-type": "multipart/form-data; boundary=x"}
    for url in [url for method, url in first_urls(routes, project) if method == "POST"]:
        for content, kind in (
            (b"a=" + b"b" * (5 << 20), {"content-type": "application/x-www-form-urlencoded"}),
            (b"&".join(b"a%d=1" % n for n in range(2000)), {"content-type": "application/x-www-form-urlencoded"}),
            (b"--x\r\nnonsense", boundary), (b"{}", {"content-type": "application/json"}), (b"", {}),
        ):  # fmt: skip
            answer = client.post(url, content=content, headers=ORIGIN | kind)
            assert answer.status_code == 413 or (len(content) < 100 and answer.status_code < 500), (url, content[:20])


def test_a_websocket_is_refused(local):
    with pytest.raises(WebSocketDisconnect) as refused, local[0].websocket_connect("ws://127.0.0.1:8001/"):
        pass
    assert refused.value.code == 1008


def test_a_url_that_is_too_long_is_none_of_ours(local):
    client, _ = local
    for url in (f"/runs/x/pictures/run/{'9' * 5000}/0", "/" + "a" * 2000):
        answer = client.get(url)
        assert (answer.status_code, "longer than any" in answer.text) == (404, True), url[:30]


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "deep"])
def test_a_file_that_says_what_pictures_show_and_cannot_be_read_breaks_no_page(tmp_path, kind):
    project = make_project(tmp_path / "project")
    client, _ = client_of(project)
    assert client.get("/runs").status_code == 200  # it remembers which pictures there are
    drawn = max(project.root.glob("runs/good/samples/step-*/drawn.json"))
    drawn.unlink()
    if kind == "pipe":
        os.mkfifo(drawn)
    elif kind == "link":
        drawn.symlink_to("/dev/zero")
    elif kind == "folder":
        drawn.mkdir()
    else:
        drawn.write_text("[" * 60_000)
    run = f"/runs/{id_of('runs/good')}"
    for url in ("/", "/runs", "/runs/events", run, f"{run}/events", f"/compare?run={id_of('runs/good')}"):
        assert client.get(url).status_code == 200, url
