"""A Hugging Face hub on loopback: the few endpoints that pushing and loading a model use.

Repositories live in memory: each revision is a dict of files. Requests without the right token are
refused where the hub would refuse them.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"
OWNER = "somebody"
# What a pushed model consists of.
MODEL_FILES = {
    "README.md",
    "config_sentence_transformers.json",
    "embedding/adapter_config.json",
    "embedding/adapter_model.safetensors",
    "modules.json",
    "reasoning/adapter_config.json",
    "reasoning/adapter_model.safetensors",
    "twn_config.json",
}
Files = dict[str, bytes]


class LocalHub:
    """The state of the hub.

    Attributes:
        url: Where it listens.
        repositories: Name -> branch or commit -> files.
        messages: Of all commits, in their order.
        requests: Method and path of every request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, Files]] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []

    def commit(self, name: str, branch: str, files: Files) -> str:
        repository = self.repositories[name]
        repository[branch] = {**repository.get(branch, repository.get("main", {})), **files}
        oid = commit_of(repository[branch])
        repository[oid] = repository[branch]
        return oid


def commit_of(files: Files) -> str:
    """Return the commit id of a set of files."""
    listed = [(name, hashlib.sha1(content).hexdigest()) for name, content in sorted(files.items())]
    return hashlib.sha1(repr(listed).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[LocalHub]:
    """Serve a new hub in the body."""
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):  # of HTTP/1.0: no connection outlives its request
        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            answer(self, hub)

        do_HEAD = do_POST = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, hub: LocalHub) -> None:
    """Answer one request."""
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    path = unquote(urlsplit(request.path).path).strip("/")
    hub.requests.append(f"{request.command} /{path}")
    parts = path.split("/")
    may_write = request.headers.get("authorization") == f"Bearer {TOKEN}"
    if request.command == "POST" and parts[1:2] != ["validate-yaml"] and not may_write:
        return send(request, 401, {"error": "Invalid username or password."})
    if path == "api/validate-yaml":
        return send(request, 200, {"errors": [], "warnings": []})
    if path == "api/repos/create":
        return create(request, hub, json.loads(body))
    if parts[:2] == ["api", "models"]:
        return api(request, hub, "/".join(parts[2:4]), parts[4:], body)
    if parts[2:3] == ["resolve"]:
        return resolve(request, hub, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
    return send(request, 404, {"error": f"unknown path {path}"})


def create(request: BaseHTTPRequestHandler, hub: LocalHub, wanted: dict[str, Any]) -> None:
    name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
    if name in hub.repositories:
        return send(request, 409, {"error": "exists", "url": f"{hub.url}/{name}"})
    hub.repositories[name] = {"main": {}}
    hub.commit(name, "main", {})
    return send(request, 200, {"url": f"{hub.url}/{name}", "name": name})


def api(
    request: BaseHTTPRequestHandler, hub: LocalHub, name: str, rest: list[str], body: bytes
) -> None:
    repository = hub.repositories.get(name)
    if repository is None:
        return send(request, 404, {"error": "Repository not found"}, code="RepoNotFound")
    verb, revision = (rest or ["revision"])[0], (rest[1:2] or ["main"])[0]
    if verb == "branch":
        repository[revision] = dict(repository["main"])
        return send(request, 200, {})
    if revision not in repository:
        return send(request, 404, {"error": "Invalid rev id"}, code="RevisionNotFound")
    files = repository[revision]
    if verb == "preupload":
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in names]
        return send(request, 200, {"files": modes})
    if verb == "commit":
        return take_commit(request, hub, name, revision, body)
    if verb == "tree":
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        return send(request, 200, listed)
    siblings = [{"rfilename": path} for path in files]
    info = {"id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings, "tags": []}
    return send(request, 200, info)


def take_commit(
    request: BaseHTTPRequestHandler, hub: LocalHub, name: str, branch: str, body: bytes
) -> None:
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    files: Files = {}
    for line in lines:
        if line["key"] == "header":
            hub.messages.append(line["value"]["summary"])
        elif line["key"] == "file":
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    oid = hub.commit(name, branch, files)
    send(request, 200, {"commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})


def resolve(
    request: BaseHTTPRequestHandler, hub: LocalHub, name: str, revision: str, path: str
) -> None:
    repository = hub.repositories.get(name)
    if repository is None:
        return send(request, 404, {"error": "Repository not found"}, code="RepoNotFound")
    if revision not in repository:
        return send(request, 404, {"error": "Invalid rev id"}, code="RevisionNotFound")
    files = repository[revision]
    if path not in files:
        return send(request, 404, {"error": "Entry not found"}, code="EntryNotFound")
    headers = {
        "X-Repo-Commit": commit_of(files),
        "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"',
    }
    return send(request, 200, files[path], headers=headers)


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    content: Any,
    *,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    """Write a response."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
    shown = {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}
    for key, value in {**shown, **({"X-Error-Code": code} if code else {})}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
