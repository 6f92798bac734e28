"""A stand-in for the hub, on this machine: the routes that an upload takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """What the hub has of one repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    def digest(self, path: str) -> str | None:
        """Git's name for a file."""
        content = self.files.get(path)
        if content is None:
            return None
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """Repositories by name; `refuse` is a status that every commit gets instead."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    refuse: int | None = None

    def create(self, body: Any) -> tuple[int, Any]:
        name = f"{body['organization']}/{body['name']}"
        taken = name in self.repositories
        if not taken:
            self.repositories[name] = Repository(body.get("visibility") == "private")
        return (409 if taken else 200), {"url": f"{self.url}/{name}", "error": "you have it"}

    def commit(self, name: str, lines: list[Any]) -> tuple[int, Any]:
        if self.refuse is not None:
            return self.refuse, {"error": "not now"}
        repository = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1"}


def answer(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    """Status and content for a request."""
    parts = path.partition("?")[0].strip("/").split("/")
    if parts == ["api", "repos", "create"]:
        return hub.create(json.loads(body))
    if parts == ["api", "validate-yaml"]:  # of the card
        return 200, {"errors": [], "warnings": []}
    name = "/".join(parts[2:4])
    repository = hub.repositories.get(name)
    if repository is None:
        return 404, {"error": "no such repository"}
    match (method, *parts[4:]):
        case ("GET",) | ("GET", "revision", _):
            siblings = [{"rfilename": path} for path in repository.files]
            return 200, {
                "id": name,
                "private": repository.private,
                "siblings": siblings,
                "sha": "1",
            }
        case ("GET", "tree", *_):
            return 200, [
                {"type": "file", "path": path, "size": 1, "oid": "1"} for path in repository.files
            ]
        case ("POST", "preupload", _):
            asked = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [
                    {
                        "path": path,
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                        "oid": repository.digest(path),
                    }
                    for path in asked
                ]
            }
        case ("POST", "commit", _):
            return hub.commit(name, [json.loads(line) for line in body.splitlines()])
        case ("PUT", "settings"):
            repository.private = json.loads(body)["visibility"] == "private"
            return 200, {}
    return 404, {"error": f"{method} {path} is no route here"}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A context in which the hub runs, at a free port of the loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, value = answer(hub, self.command, self.path, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
