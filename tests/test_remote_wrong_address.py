"""What answers at a URL may be no store, or refuse this user: it is said so, and what was committed stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from k5cache.cli import app
from k5cache.remote.objects import Objects
from k5cache.shared.errors import StoreError
from tests.cli import Cli
from tests.object_store import another_machine, files_of, put, rows_of

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body></body></html>"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """A server that gives every request the same answer; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in {"Content-Type": "text/html", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 (as http.server calls them)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield "http://{}:{}".format(*http.server_address)
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [(200, PAGE, {}), (404, PAGE, {}), (200, PAGE, {"ETag": '"1-2"'}), (200, b"{}", {"Content-Type": "text/json"})],
    ids=["a login page", "a web server", "an application of one page", "another service"],
)
def test_what_is_no_store_is_said_to_be_none_and_not_a_damaged_cache(store, shop, monkeypatch, status, body, headers):
    with answering(status, body, **headers) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        done = Cli(store)(app, "info", "s3://bucket/cats")
        assert done.code == 2
        first, second = done.err.splitlines()
        assert f"s3://bucket/cats/manifest.json: the store at {address} (the address is from AWS_ENDPOINT_URL)" in first
        assert "does not answer as an object store does" in first
        assert second.strip().startswith("fix: Correct AWS_ENDPOINT_URL, or log in if a proxy wants that")


def test_a_login_page_is_not_taken_for_a_written_object_or_an_empty_listing(store, tmp_path, monkeypatch):
    (tmp_path / "shard").write_bytes(b"rows")
    with answering(200, PAGE) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        objects = Objects("s3://bucket/x")
        for ask in (
            lambda: objects.send("shard", tmp_path / "shard"),
            lambda: objects.replace("manifest.json", b"{}", None),
            objects.entries,
        ):
            with pytest.raises(StoreError, match="does not answer as an object store does"):
                ask()


def test_a_gateway_that_says_with_a_page_that_the_store_is_busy_is_asked_again(store, monkeypatch):
    with answering(503, PAGE) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(StoreError) as caught:
            Objects("s3://bucket/x").entries()
    assert "does not answer as" not in caught.value.problem
    assert "Check the network" in caught.value.fix


def test_a_token_that_has_expired_is_said_so(store, monkeypatch):
    with answering(400, EXPIRED) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(StoreError, match="Cannot list s3://bucket/x: The provided token has expired") as caught:
            Objects("s3://bucket/x").entries()
        assert "Renew it (Set AWS_PROFILE, or" in caught.value.fix
        with pytest.raises(StoreError, match="Bad Request") as caught:  # HEAD has no words
            Objects("s3://bucket/x").stat("manifest.json")
        assert "A token that has expired is answered so too" in caught.value.fix


@pytest.mark.parametrize("words", ["The provided token has expired.", "Access Denied"])
def test_a_right_that_ends_in_mid_run_leaves_what_was_committed_and_the_same_command_goes_on(
    store, shop, monkeypatch, words
):
    import s3fs

    prefix = f"right-{len(words)}"
    put(prefix, files_of(shop.root))
    old = rows_of(shop.root)
    shop.put("7.png", "a seventh", seed=7)
    call_s3 = s3fs.S3FileSystem._call_s3

    async def refusing(self, method, *arguments, **options):
        if method == "put_object" and options["Key"].endswith("manifest.json"):
            raise PermissionError(words)
        return await call_s3(self, method, *arguments, **options)

    arguments = ("encode", str(shop.source), "-o", f"s3://bucket/{prefix}", "--model", str(shop.model),
                 "--device", "cpu", "--set", "cache.resolution=64")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", refusing)
        done = Cli(store)(app, *arguments)
    assert done.code == 2, done.err
    assert f"Cannot write s3://bucket/{prefix}/manifest.json: {words}" in done.err
    assert f"What is not in s3://bucket/{prefix} yet is kept on this machine: the same command sends it" in done.err
    another_machine(store / "other", monkeypatch)
    assert rows_of(f"s3://bucket/{prefix}") == old
    another_machine(store / "home", monkeypatch)
    done = Cli(store)(app, *arguments)
    assert done.code == 0, done.err
    another_machine(store / "third", monkeypatch)
    assert len([key for kind, key in rows_of(f"s3://bucket/{prefix}") if kind == "latents"]) == 7


@pytest.mark.parametrize("home", ["a file", "a file/below"])
def test_a_home_that_cannot_be_made_is_named_with_what_to_set(store, shop, monkeypatch, home):
    put("home", files_of(shop.root))
    (store / "a file").write_text("a person's")
    another_machine(store / home, monkeypatch)
    done = Cli(store)(app, "info", "s3://bucket/home")
    assert done.code == 2
    assert "fix: Set K5_HOME to a folder that can be written" in done.err
    assert (store / "a file").read_text() == "a person's"
