"""A hub on this machine: as much of its protocol as the real huggingface_hub client asks for.

Uploads (repos, branches, regular and LFS files, commits) and downloads of what was uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass
class Hub:
    """What the hub holds: files by repo and branch, and what it was asked."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    commits: int = 0

    def commit(self, repo: str, branch: str) -> str:
        """A commit's name, made from its content."""
        files = self.branches[repo, branch]
        text = repr(sorted((n, hashlib.sha256(b).hexdigest()) for n, b in files.items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def find(self, repo: str, revision: str) -> str | None:
        """The branch that a revision (a branch or a commit) means."""
        return next(
            (b for r, b in self.branches if r == repo and revision in (b, self.commit(repo, b))),
            None,
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that is served while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:
        oid, raw = self.path.rpartition("/")[2], self._body()
        assert hashlib.sha256(raw).hexdigest() == oid
        self.hub.objects[oid] = raw
        self._answer(200)

    def do_POST(self) -> None:
        hub, path, raw = self.hub, unquote(urlparse(self.path).path), self._body()
        hub.asked.append(path)
        if path == "/api/repos/create":
            data = json.loads(raw)
            repo = f"{data['organization']}/{data['name']}"
            if repo in hub.private:
                taken = {"error": "you already created this repo", "url": f"{hub.url}/{repo}"}
                return self._answer(409, taken)
            hub.private[repo] = data.get("visibility") == "private"
            hub.branches[repo, "main"] = {}
            return self._answer(200, {"url": f"{hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            assert json.loads(raw)["content"].startswith("---\n")
            return self._answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(raw)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(raw)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            hub.branches.setdefault((match[1], match[2]), {})
            return self._answer(201)
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self._commit(match[1], match[2], raw)
        return self._answer(404, {"error": "not found"})

    def _commit(self, repo: str, branch: str, raw: bytes) -> None:
        files = self.hub.branches[repo, branch]
        for line in map(json.loads, raw.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits += 1
        commit = self.hub.commit(repo, branch)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlparse(self.path).path)
        hub.asked.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            branch = hub.find(match[1], match[3] or "main")
            if branch is None:
                return self._answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            files = hub.branches[match[1], branch]
            if match[2] == "tree":
                tree = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in sorted(files.items())
                ]
                return self._answer(200, json.dumps(tree).encode())
            names = [{"rfilename": name} for name in sorted(files)]
            data = {"id": match[1], "sha": hub.commit(match[1], branch), "siblings": names}
            return self._answer(200, data)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            branch = hub.find(match[1], match[2])
            raw = hub.branches.get((match[1], branch or ""), {}).get(match[3])
            if branch is None or raw is None:
                return self._answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha256(raw).hexdigest()}"'
            return self._answer(200, raw, ETag=etag, X_Repo_Commit=hub.commit(match[1], branch))
        return self._answer(404, {"error": "not found"})
