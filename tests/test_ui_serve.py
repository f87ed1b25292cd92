"""The server of the page: a port that is taken, who may ask, streams that end with it, and text in its templates."""

from __future__ import annotations

import http.client
import socket
import threading
import time

import pytest

from k5cache.shared.errors import OutputError, RunError
from k5train.cli import app
from k5train.ui import serve, words
from k5train.ui.app import create_app
from k5train.ui.events import message, stream
from k5train.ui.guard import Access
from k5train.ui.project import Project, open_project
from k5train.ui.serve import Server, access_for, open_socket, url_of
from tests.cli import Cli
from tests.ui_project import client_of


def test_a_port_that_is_taken_and_a_host_that_is_not_here_are_said_in_two_lines(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = Cli(tmp_path)(app, "ui", "--port", str(port))
    assert done.code == 2
    problem, fix = done.err.splitlines()
    assert problem == f"error: Port {port} of 127.0.0.1 is taken, perhaps by another k5train ui"
    assert fix.startswith("  fix: End the other program, or take another port: k5train ui --port ")
    for host, said in (
        ("nosuch.invalid", "not a name or an address"),
        ("203.0.113.7", "not an address of this machine"),
    ):
        with pytest.raises(OutputError, match=said):
            open_socket(host, 0)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("model", "said"), [
    (".", "error: . is no model: it has no folder transformer, text_encoder or vae"),
    ("./k5", "error: There is no model folder ./k5"),
])  # fmt: skip
def test_a_folder_that_is_no_model_is_refused_before_the_page_begins(tmp_path, model, said):
    done = Cli(tmp_path)(app, "ui", "--port", "0", "--model", model)
    assert (done.code, done.err.splitlines()[0]) == (2, said)


def test_a_token_is_asked_for_unless_only_this_machine_can_ask():
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert access_for(host, 8001, False).token is None, host
        assert len(access_for(host, 8001, True).token) >= 43
    for host in ("0.0.0.0", "::", "192.168.1.7", "box"):
        access = access_for(host, 8001, False)
        assert len(access.token) >= 43  # 32 random bytes
        assert access.token != access_for(host, 8001, False).token
        assert access.is_any_address == (host in ("0.0.0.0", "::"))
        assert access.is_any_address or host in access.hosts
    assert url_of("::1", 8001, Access()) == "http://[::1]:8001/"
    assert url_of("127.0.0.1", 80, Access(token="abc")) == "http://127.0.0.1:80/?token=abc"


def test_streams_that_are_open_end_at_once_when_the_server_stops(tmp_path, monkeypatch):
    asked = []

    def changes():
        asked.append(1)
        return {"number": f"<b>{len(asked) // 3}</b>"}

    monkeypatch.setattr("k5train.ui.overview_pages.overview", lambda request: stream(request, changes, 0.01))
    server = Server(create_app(Project(tmp_path)))
    opened = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    client = http.client.HTTPConnection(*opened.getsockname(), timeout=10)
    client.request("GET", "/")
    answer = client.getresponse()
    lines = [answer.readline() for _ in range(6)]
    assert lines == [b"event: number\n", b"data: <b>0</b>\n", b"\n", b"event: number\n", b"data: <b>1</b>\n", b"\n"]
    started = time.monotonic()
    server.stop()
    thread.join(5)
    assert time.monotonic() - started < 1
    answer.read()  # to its end
    client.close()
    assert len(server.page.state.listeners) == 0
    at_the_end = len(asked)
    time.sleep(0.05)
    assert len(asked) == at_the_end


def test_a_client_that_stops_in_the_middle_of_a_form_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("k5train.ui.guard.SECONDS_FOR_A_PART", 0.05)
    server, opened = Server(create_app(Project(tmp_path))), open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    host, port = opened.getsockname()
    head = (
        f"POST /queue/clear HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: http://{host}:{port}\r\nContent-Length: 99\r\n"
    )
    with socket.create_connection((host, port), 10) as client:
        client.sendall(f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\na=1".encode())
        answer = client.recv(100_000)
    server.stop()
    thread.join(5)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert [*tmp_path.iterdir()] == []


def test_a_client_that_sends_no_request_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS_FOR_A_BEGINNING", 0.3)
    opened = open_socket("127.0.0.1", 0)
    server = Server(create_app(Project(tmp_path.resolve())))
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    address = ("127.0.0.1", opened.getsockname()[1])
    try:
        for beginning in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: y"):
            with socket.create_connection(address, timeout=10) as client:
                client.sendall(beginning)
                assert client.recv(100) == b"", beginning
        with socket.create_connection(address, timeout=10) as client:
            for _ in range(2):  # a connection that is kept
                client.sendall(b"GET /runs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 200"
                time.sleep(0.1)
                client.recv(1 << 20)
    finally:
        server.stop()
        thread.join()


def test_a_stream_ends_with_two_lines_when_what_it_shows_is_gone(tmp_path, monkeypatch):
    def gone():
        raise RunError("runs/<b> is no longer there", "Go back")

    monkeypatch.setattr("k5train.ui.overview_pages.overview", lambda request: stream(request, gone))
    with client_of(Project(tmp_path))[0] as client:
        text = client.get("/").text
    assert text.startswith("event: problem\ndata: <div")
    assert "runs/&lt;b&gt; is no longer there" in text
    assert text.endswith("event: end\ndata: \n\n")
    assert message("a", "x\r\ny\rz\udc80") == b"event: a\ndata: x\ndata: y\ndata: z\\udc80\n\n"


def test_numbers_times_and_durations_are_written_for_people():
    assert [words.number(n) for n in (12345, 0.123456, 3.0, None, float("nan"), float("inf"))] == [
        "12,345", "0.1235", "3", "–", "–", "infinite",
    ]  # fmt: skip
    assert [words.of_seconds(s) for s in (75, -3.0, None)] == ["1 min 15 s", "0.0 s", "–"]
    now = time.time()
    assert ">today " in words.when(now)
    assert ">1970-01-" in words.when(86400 * 5)
    assert [words.when(value) for value in (None, 1e20, float("nan"))] == ["–"] * 3


def test_a_project_ends_at_its_links(tmp_path):
    (tmp_path / "project" / "runs").mkdir(parents=True)
    (tmp_path / "project" / "runs" / "out").symlink_to(tmp_path)
    project = open_project(tmp_path / "project")
    for path in ("runs/out", "..", "/etc/passwd", "runs/../../x"):
        with pytest.raises(OutputError, match="leads out"):
            project.inside(path)
    assert project.inside("runs/new") == tmp_path / "project" / "runs" / "new"
    assert project.relative(project.root / "runs" / "out") == "runs/out"


def test_a_project_that_cannot_be_written_says_so_on_every_page(tmp_path, monkeypatch):
    monkeypatch.setattr("k5train.ui.project.os.access", lambda path, mode: False)
    with client_of(Project(tmp_path))[0] as client:
        assert f"There is no permission to write in {tmp_path}" in client.get("/").text
        assert client.get("/").status_code == 200
