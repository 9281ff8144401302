"""A small hub: serves folders of models by the part of the Hugging Face API that a download needs."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Hub:
    """models: name -> {commit: folder}, the last commit is `main`. refused: name -> (status, error code) of the hub.
    asked: every request, as `METHOD path`. cut: bytes after which the next transfer of a file breaks off, once."""

    def __init__(self):
        self.models: dict[str, dict[str, Path]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        self.cut: int | None = None
        self.endpoint = ""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, with_body: bool):
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        if name in self.hub.refused or name not in self.hub.models:
            status, code = self.hub.refused.get(name, (404, "RepoNotFound"))
            return self._send(status, b"{}", {"X-Error-Code": code})
        commits = self.hub.models[name]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = commits[commit]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if is_api and rest[:1] == ["tree"]:
            listed = [{"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _tag(f)}
                      for f in files]  # fmt: skip
            return self._send(200, json.dumps(listed).encode())
        if is_api:
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self._send_file(file, commit, with_body)

    def _send_file(self, file: Path, commit: str, with_body: bool):
        data, start = file.read_bytes(), 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            start = int(wanted[6:].split("-")[0])
        headers = {"ETag": f'"{_tag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            cut, self.hub.cut = (
                (self.hub.cut, None) if len(body) > (self.hub.cut or len(body)) else (None, self.hub.cut)
            )
            self.wfile.write(body[:cut])
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
