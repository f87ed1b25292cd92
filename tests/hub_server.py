"""A stand-in for the hub: a small HTTP server that answers what huggingface_hub asks, from and to memory.

It was written from the client's own requests. It has no xet and no pull requests, and every upload is one of git or
LFS. ``Hub.requests`` has what was asked, and ``Hub.refuse`` answers a request with a code instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_" + "Planted0Secret1" * 2


@dataclass
class Repository:
    """One repository: the files of its newest commit, and those of earlier ones by commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    commit: str = ""

    def put(self, files: dict[str, bytes], deleted: tuple[str, ...] = (), message: str = "") -> None:
        """One commit."""
        self.files = {name: data for name, data in self.files.items() if name not in deleted} | files
        self.lfs |= {name for name, data in files.items() if not _is_small(name, data)}
        seed = json.dumps([len(self.commits), sorted(self.files)])
        self.commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[self.commit] = self.files
        self.messages.append(message)


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By ``models/owner/name`` or ``datasets/owner/name``."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: Callable[[str], int | None] = lambda request: None
    public_reads: bool = True

    def model(self, name: str, folder: Path) -> Repository:
        """A repository with the files of ``folder``."""
        repository = self.repositories.setdefault(f"models/{name}", Repository())
        repository.put({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        return repository

    def fetched(self) -> list[str]:
        """The files whose bytes were sent, in order."""
        sent = [path for path in self.requests if path.startswith("GET /") and "/resolve/" in path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in sent]


def _is_small(name: str, data: bytes) -> bool:
    return len(data) < 10_000 and not name.endswith((".safetensors", ".parquet", ".png"))


def _listed(name: str, data: bytes, is_lfs: bool) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "path": name, "type": "file", "size": len(data), "blobId": blob}
    entry["oid"] = blob
    if is_lfs:
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path, request = unquote(split.path), f"{self.command} {unquote(split.path)}"
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(request)
        if status := self.hub.refuse(request):
            codes = {401: "", 403: "", 404: "RepoNotFound"}
            self._send(status, {"error": "refused"}, {"X-Error-Code": codes.get(status, "")})
            return
        is_writing = self.command in ("POST", "PUT") and "/blobs/" not in path
        if (is_writing or path == "/api/whoami-v2") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        self._route(path, parse_qs(split.query))

    def _route(self, path: str, query: dict[str, list[str]]) -> None:
        if path == "/api/whoami-v2":
            self._send(200, {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            self._send(200, {"warnings": [], "errors": []})
        elif path.startswith("/blobs/"):
            self.hub.blobs[path.removeprefix("/blobs/")] = self._body
            self._send(200, {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch()
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), query)
        else:
            self._resolve(path[1:])

    def _create(self) -> None:
        asked = json.loads(self._body)
        name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
        name = name if "/" in name else f"me/{name}"
        key = f"{asked.get('type') or 'model'}s/{name}"
        if key in self.hub.repositories:
            self._send(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"})
            return
        repository = self.hub.repositories[key] = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        repository.put({".gitattributes": b""})
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _batch(self) -> None:
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        kind, owner, name, *rest = [*path.split("/"), "", ""]
        rest = rest[:-2]
        repository = self.hub.repositories.get(f"{kind}/{owner}/{name}")
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if what == "preupload":
            files = json.loads(self._body)["files"]
            modes = [
                {"path": f["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "regular" if _is_small(f["path"], b" " * f["size"]) else "lfs"}
                for f in files
            ]  # fmt: skip
            self._send(200, {"files": modes})
        elif what == "commit":
            self._commit(repository, f"{self.hub.url}/{kind}/{owner}/{name}".replace("/models/", "/"))
        else:
            commit = repository.commit if revision == "main" else revision
            if commit not in repository.commits:
                self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
                return
            files = repository.commits[commit]
            listed = [_listed(name, data, name in repository.lfs) for name, data in sorted(files.items())]
            if what == "tree":
                self._send(200, listed)
            else:
                document = {"id": f"{owner}/{name}", "sha": commit, "private": repository.private, "siblings": listed}
                self._send(200, document)

    def _commit(self, repository: Repository, url: str) -> None:
        lines = [json.loads(line) for line in self._body.splitlines() if line.strip()]
        files, deleted, message = {}, [], ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
        repository.put(files, tuple(deleted), message)
        answer = {"commitUrl": f"{url}/commit/{repository.commit}", "commitOid": repository.commit}
        self._send(200, {**answer, "pullRequestUrl": None})

    def _resolve(self, path: str) -> None:
        where, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        repository = self.hub.repositories.get(where if where.startswith("datasets/") else f"models/{where}")
        commit = repository.commit if repository and revision == "main" else revision
        data = (repository.commits.get(commit) or {}).get(name) if repository else None
        if repository is None or data is None:
            code = "EntryNotFound" if repository else "RepoNotFound"
            self._send(404, {"error": "not found"}, {"X-Error-Code": code})
            return
        entry = _listed(name, data, name in repository.lfs)
        headers = {"ETag": f'"{entry.get("lfs", {}).get("oid") or entry["oid"]}"', "X-Repo-Commit": commit}
        self._send(200, data, headers)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, answering at ``hub.url``."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(hub: Hub, downloads: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """huggingface_hub asks this server, keeps its downloads in ``downloads`` and has this token. These are what
    ``HF_ENDPOINT``, ``HF_HUB_CACHE`` and ``HF_TOKEN`` set when it is imported."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(downloads))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(downloads / "token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
