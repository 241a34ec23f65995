"""A Hugging Face Hub on this machine, as far as uploads go: it keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_testtokentesttokentesttoken"


class Hub:
    """The requests of a commit, as the Hub answers them: create, preupload, the card's metadata, commit."""

    def __init__(self) -> None:
        hub = self
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, bytes]] = []
        self.files: dict[str, bytes] = {}
        self.status = 200
        self.read_only = False
        """The token may read what is there, and not write."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    hub.answer(self, 401, {"error": "Invalid username or password."})
                elif hub.status != 200 or hub.read_only:
                    hub.answer(self, 403 if "auth-check" in self.path else hub.status, {"error": "no"})
                else:
                    listed = [{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in hub.files]
                    hub.answer(self, 200, listed if "/tree/main" in self.path else {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    hub.answer(self, 401, {"error": "Invalid username or password."})
                elif hub.status != 200:
                    hub.answer(self, hub.status, {"error": "no"})
                else:
                    hub.answer(self, 200, hub.serve(self.path, body))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def serve(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.repos[wanted["name"]] = wanted
            return {"url": f"{self.url}/{wanted['organization']}/{wanted['name']}"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        assert path == "/api/models/me/tuned/commit/main"
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        self.commits.append({name: base64.b64decode(content) for name, content in files.items()})
        gone = tuple(line["value"]["path"] for line in lines if line["key"] == "deletedFolder")
        self.files = {name: c for name, c in self.files.items() if not gone or not name.startswith(gone)}
        self.files |= self.commits[-1]
        return {"commitUrl": f"{self.url}/me/tuned/commit/{'0' * 40}", "commitOid": "0" * 40}

    def env(self, token: str = TOKEN) -> dict[str, str]:
        """Of whoever uploads to it."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.server.shutdown()
