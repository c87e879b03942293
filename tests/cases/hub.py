"""A stand-in of the Hub's file API on this machine, for the real client: repositories, commits, large files, downloads.

It speaks what `create_repo`, `create_commit` and `snapshot_download` ask: a repository has branches, a branch a commit,
a commit whole files. Whoever writes has to show the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_stand_in"

Files = dict[str, bytes]


class Hub:
    """The repositories of a stand-in, and every request that it got."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}  #: by repository
        self.commits: dict[str, Files] = {}  #: by hash
        self.private: dict[str, bool] = {}
        self.large: Files = {}  #: by SHA-256
        self.requests: list[str] = []
        self.endpoint = ""

    def create(self, repo: str, private: bool = True) -> None:
        self.branches[repo], self.private[repo] = {}, private
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, repo: str, branch: str, files: Files) -> str:
        """Lay a commit with all files on a branch, and return its hash."""
        made = hashlib.sha1(f"{repo} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[made] = files
        self.branches[repo][branch] = made
        return made

    def files(self, repo: str, revision: str = "main") -> Files:
        return self.commits[self.resolved(repo, revision) or ""]

    def resolved(self, repo: str, revision: str) -> str | None:
        """Return the hash of a branch, or of a commit that is there."""
        return self.branches[repo].get(revision, revision if revision in self.commits else None)


def _create(hub: Hub, asker: Asker) -> None:
    asked = asker.json()
    assert asked["type"] == "dataset"
    repo = f"{asked['organization']}/{asked['name']}"
    url = f"{hub.endpoint}/datasets/{repo}"
    if repo in hub.branches:
        return asker.answer(409, {"error": "You already created this dataset repo", "url": url})
    hub.create(repo, asked["visibility"] == "private")
    asker.answer(200, {"url": url, "id": repo, "name": repo})


def _preupload(hub: Hub, asker: Asker, repo: str, revision: str) -> None:
    if hub.resolved(repo, revision) is None:
        return asker.missing("RevisionNotFound")
    modes = {True: "lfs", False: "regular"}
    files = [
        {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
        for f in asker.json()["files"]
    ]
    asker.answer(200, {"files": files})


def _large(hub: Hub, asker: Asker, repo: str) -> None:
    objects = [
        {**x, "actions": {"upload": {"href": f"{hub.endpoint}/large/{x['oid']}"}}} for x in asker.json()["objects"]
    ]
    asker.answer(200, {"transfer": "basic", "objects": objects})


def _put(hub: Hub, asker: Asker, oid: str) -> None:
    assert hashlib.sha256(asker.content).hexdigest() == oid
    hub.large[oid] = asker.content
    asker.answer(200, {})


def _commit(hub: Hub, asker: Asker, repo: str, branch: str) -> None:
    _, *lines = [json.loads(line) for line in asker.content.splitlines()]
    files = dict(hub.files(repo, branch))
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            assert value["encoding"] == "base64"
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            assert line["key"] == "lfsFile"
            files[value["path"]] = hub.large[value["oid"]]
    made = hub.commit(repo, branch, files)
    asker.answer(200, {"commitUrl": f"{hub.endpoint}/datasets/{repo}/commit/{made}", "commitOid": made})


def _info(hub: Hub, asker: Asker, repo: str, revision: str) -> None:
    sha = hub.resolved(repo, revision)
    if sha is None:
        return asker.missing("RevisionNotFound")
    asker.answer(200, {"id": repo, "sha": sha, "private": hub.private[repo], "tags": [], "siblings": []})


def _tree(hub: Hub, asker: Asker, repo: str, revision: str) -> None:
    files = hub.files(repo, revision)
    entries = [{"type": "file", "path": p, "size": len(x), "oid": _oid(x)} for p, x in files.items()]
    asker.answer(200, entries)


def _resolve(hub: Hub, asker: Asker, repo: str, revision: str, path: str) -> None:
    files = hub.files(repo, revision)
    if path not in files:
        return asker.missing("EntryNotFound")
    headers = {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": hub.resolved(repo, revision) or ""}
    asker.send(200, files[path], headers)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_REPO = r"([^/]+/[^/]+?)"
#: (method, pattern of the path, whether one has to show the token) -> answer
_ROUTES: list[tuple[str, str, bool, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", True, _create),
    ("POST", rf"/api/datasets/{_REPO}/preupload/([^/]+)", True, _preupload),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", True, _large),
    ("PUT", r"/large/(\w+)", False, _put),
    ("POST", rf"/api/datasets/{_REPO}/commit/([^/]+)", True, _commit),
    ("GET", rf"/api/datasets/{_REPO}/revision/([^/]+)", False, _info),
    ("GET", rf"/api/datasets/{_REPO}/tree/([^/]+)/?", False, _tree),
    ("GET", rf"/datasets/{_REPO}/resolve/([^/]+)/(.+)", False, _resolve),
]


class Asker(BaseHTTPRequestHandler):
    """One request of a client."""

    hub: Hub
    content: bytes
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, guarded, answer in _ROUTES:
            if known == method and (found := re.fullmatch(pattern, path)):
                return self._answered(answer, [unquote(part) for part in found.groups()], guarded)
        self.answer(404, {"error": f"no such endpoint: {self.command} {path}"})

    def _answered(self, answer: Callable[..., None], parts: list[str], guarded: bool) -> None:
        if guarded and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if parts and "/" in parts[0] and parts[0] not in self.hub.branches:
            return self.missing("RepoNotFound")
        answer(self.hub, self, *parts)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def json(self) -> Any:
        return json.loads(self.content)

    def missing(self, code: str) -> None:
        self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def running() -> Iterator[Hub]:
    """Yield a stand-in that answers at `hub.endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Asker,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that the client is pointed at, with a cache of its own, online and without a saved token."""
    from huggingface_hub import constants

    place = tmp_path_factory.mktemp("hub")
    with running() as found:
        for name, value in {
            "ENDPOINT": found.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(place / "cache"),
            "HF_TOKEN_PATH": str(place / "token"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
