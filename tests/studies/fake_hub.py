"""A hub on this machine: repositories in memory, behind the few addresses that huggingface_hub asks
for when it makes one, uploads a folder and fetches it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Attributes: repos: repository -> file -> bytes; private: repository -> bool."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that answers as long as the block runs."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, hub = urlsplit(self.path).path, self.server
        hub.asked.append(f"POST {path}")
        if path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            hub.repos.setdefault(name, {})
            hub.private[name] = given.get("private", given.get("visibility") == "private")
            self.answer({"url": f"{hub.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    hub.repos[repo][item["value"]["path"]] = content
            url = f"{hub.address}/{repo}/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.answer({"error": f"no such address {path}"}, 404)

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.asked.append(f"{self.command} {path}")
        repo, _, rest = path.removeprefix("/api/models/").strip("/").partition("/re")
        repo = repo.partition("/tree/")[0]
        if repo not in hub.repos:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/") and "/tree/" in path:
            files = [self.describe(name, content) for name, content in hub.repos[repo].items()]
            self.answer(files)
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in hub.repos[repo]]
            self.answer({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
        else:
            name = rest.removeprefix("solve/").partition("/")[2]
            content = hub.repos[repo][name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(content, 200, headers | {"Content-Type": "application/octet-stream"})

    do_HEAD = do_GET

    def describe(self, name: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": digest}

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        named = {"Content-Type": "application/json", **(headers or {})}
        self.send(json.dumps(value).encode(), status, named)

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
