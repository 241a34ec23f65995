"""Live prices come from a real server, once an hour, and whatever goes wrong there is never the user's problem."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from runner.cloud.runpod import prices
from runner.cloud.runpod.prices import price

KEY = "rpa_not_a_real_key"
CATALOGUE = {  # as in the published description of the API
    "gpus": [
        {
            "id": "NVIDIA GeForce RTX 4090",
            "name": "RTX 4090",
            "pool": "ADA_24",
            "manufacturer": "NVIDIA",
            "memory": 24,
            "secure": True,
            "community": True,
            "price": {"secure": 0.44, "community": 0.31, "serverless": 1.1},
            "maxCount": {"secure": 8, "community": 4},
        },
        {"id": "NVIDIA B200", "secure": True, "community": False, "price": {"secure": 6, "community": 5.5}},
    ]
}


class Server(ThreadingHTTPServer):
    """A RunPod that answers what the test says and remembers what it was asked."""

    daemon_threads = True
    status = 200
    body = json.dumps(CATALOGUE).encode()
    location: str | None = None
    delay = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet: a client that gave up is what one test is about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v2"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        assert str(self.headers.get("User-Agent")).startswith("llm-finetuning-runner/")
        time.sleep(self.server.delay)
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Two servers, listening."""
    both = [Server(), Server()]
    for server in both:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


@pytest.fixture
def runpod(servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The one that the runner is pointed at, with a key and an empty cache."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    monkeypatch.setenv("RUNPOD_API_BASE_URL", servers[0].url)
    return servers[0]


def test_the_price_is_the_catalogues_and_says_when_and_for_which_cloud(runpod: Server) -> None:
    found = price("NVIDIA GeForce RTX 4090")
    assert found is not None and found.usd_per_hour == 0.44
    assert found.source.startswith("RunPod's catalogue, secure cloud, 20") and found.source.endswith(" UTC")
    other = price("NVIDIA GeForce RTX 4090", "community")
    assert other is not None and other.usd_per_hour == 0.31
    assert runpod.asked == [("/v2/catalog/gpus", f"Bearer {KEY}")]


def test_a_price_of_a_cloud_that_has_no_such_gpu_does_not_count(runpod: Server) -> None:
    found = price("NVIDIA B200")
    assert found is not None and found.usd_per_hour == 6.0
    assert price("NVIDIA B200", "community") is None
    assert price("NVIDIA H9000") is None and price(None) is None


def test_it_is_asked_once_an_hour(runpod: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert price("NVIDIA B200") and price("NVIDIA B200")
    monkeypatch.setattr("runner.cloud.runpod.prices.time.time", lambda: now + 3590)
    assert price("NVIDIA B200")
    assert len(runpod.asked) == 1
    monkeypatch.setattr("runner.cloud.runpod.prices.time.time", lambda: now + 3700)
    assert price("NVIDIA B200")
    assert len(runpod.asked) == 2


def test_without_a_key_nothing_is_asked(runpod: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert price("NVIDIA B200") is None
    assert runpod.asked == []


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b'{"title": "Unauthorized"}'),
        (429, b"{}"),
        (502, b"<html>Bad gateway</html>"),
        (200, b"<html>log in</html>"),
        (200, b"[]"),
        (200, b'{"gpus": null}'),
        (200, b'{"gpus": [{"id": "NVIDIA B200"}]}'),
        (200, b'{"gpus": [{"id": "NVIDIA B200", "price": {"secure": "a lot"}}]}'),
        (200, b"\xff\xfe"),
    ],
)
def test_a_bad_answer_is_no_price_and_is_not_asked_for_again_at_once(
    runpod: Server, status: int, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    runpod.status, runpod.body = status, body
    assert price("NVIDIA B200") is None
    runpod.status, runpod.body = 200, Server.body
    assert price("NVIDIA B200") is None and len(runpod.asked) == 1
    later = time.time() + 61
    monkeypatch.setattr("runner.cloud.runpod.prices.time.time", lambda: later)
    assert price("NVIDIA B200") is not None


def test_a_server_that_hangs_is_given_up(runpod: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prices.TIMEOUT_S <= 2
    monkeypatch.setattr(prices, "TIMEOUT_S", 0.1)
    runpod.delay = 1.0
    assert price("NVIDIA B200") is None  # the answer, a second later, has one


def test_nobody_there_is_no_price(runpod: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", "http://127.0.0.1:1/v2")
    assert price("NVIDIA B200") is None
    monkeypatch.setenv("RUNPOD_API_BASE_URL", "no address")
    assert price("NVIDIA B200") is None


def test_a_redirect_does_not_get_the_key(runpod: Server, servers: list[Server]) -> None:
    runpod.status, runpod.location = 302, f"{servers[1].url}/elsewhere"
    price("NVIDIA B200")
    assert servers[1].asked == [("/v2/elsewhere", None)]


def test_the_key_is_written_nowhere(
    runpod: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    price("NVIDIA B200")
    runpod.status = 500
    monkeypatch.setenv("RUNPOD_API_BASE_URL", f"{runpod.url}/other")
    price("NVIDIA B200")
    stored = [file.read_text("utf-8") for file in tmp_path.rglob("*") if file.is_file()]
    assert stored and KEY not in "".join(stored)
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("broken", ["", "[]", '{"time": "now"}', '{"base": 1}'])
def test_a_broken_cache_is_asked_for_again(runpod: Server, tmp_path: Path, broken: str) -> None:
    (tmp_path / "prices.json").write_text(broken, "utf-8")
    assert price("NVIDIA B200") is not None
    assert len(runpod.asked) == 1


def test_a_cache_that_cannot_be_written_is_no_harm(runpod: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", "/dev/null/cache")
    assert price("NVIDIA B200") is not None
