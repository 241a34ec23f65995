"""Every wait for RunPod has a bound in all, and no answer, however odd, is more than an error of this project's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.provider import PodRequest
from runner.cloud.provider_errors import ApiDownError, UnclearError
from runner.cloud.runpod import prices, transport
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.runpod_provider import RunPod
from runner.errors import RunnerError
from runner.hub import config_json
from runner.hub.config_json import UnreachableError
from tests.cloud.test_agent_disks import odd
from tests.support.emulated import IMAGE

__all__ = ["odd"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
BEGUN = {"status line": b"", "headers": b"HTTP/1.1 200 OK\r\nX: ", "body": HEAD + b"Content-Length: 99999\r\n\r\n"}


@pytest.fixture
def api(odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", odd["url"])
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_key")
    monkeypatch.setattr(transport, "PAUSE_S", 0.01)
    return RunPod()


ASKED: list[Callable[[Api], Any]] = [
    Api.pods, lambda api: api.pod("a"), lambda api: api.terminate("a"), lambda api: api.stop("a"), Api.gpus,
    Api.volumes,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ask", ASKED, ids=["list", "get", "terminate", "stop", "gpus", "volumes"])
@pytest.mark.parametrize("where", ["status line", "headers", "body"])
def test_an_answer_that_drips_ends(
    api: Api, odd: dict[str, Any], ask: Callable[[Api], Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte every 20 ms, as 50 B/s is: no single wait is long."""
    monkeypatch.setattr(transport, "TOTAL_S", 0.3)
    monkeypatch.setattr(transport, "TRIES", 2)
    odd |= {"words": BEGUN[where] + b" " * 2000, "pause": 0.02}
    began = time.monotonic()
    with pytest.raises(ApiDownError, match=r"no answer in time"):
        ask(api)
    assert time.monotonic() - began < 5


def test_a_create_that_drips_is_unclear(api: Api, odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "TOTAL_S", 0.3)
    odd |= {"words": HEAD + b" " * 2000, "pause": 0.02}
    for spot in (None, 0.2):
        asked = odd["asked"]
        with pytest.raises(UnclearError):
            api.create_pod(PodRequest("runner-a-1", IMAGE, "secure", gpu_id="NVIDIA L4", bid_usd=spot))
        assert odd["asked"] == asked + 1  # and never again


@pytest.mark.parametrize("where", list(BEGUN))
def test_a_plan_does_not_wait_for_what_drips(
    api: Api, odd: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither for RunPod's prices nor for the Hub's facts of a model."""
    monkeypatch.setattr(prices, "TOTAL_S", 0.3)
    monkeypatch.setattr(config_json, "TOTAL_S", 0.3)
    monkeypatch.setattr(prices, "_file", lambda: tmp_path / "prices.json")
    monkeypatch.setenv("HF_ENDPOINT", odd["url"])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    odd |= {"words": BEGUN[where] + b" " * 2000, "pause": 0.02}  # 40 s
    began = time.monotonic()
    assert prices.price("NVIDIA L4") is None
    with pytest.raises(UnreachableError, match=r"the Hub cannot be reached for org/model: .*no whole answer in time"):
        config_json._get("org/model", "main")
    assert odd["asked"] == 2 and time.monotonic() - began < 5


def test_a_hub_that_does_not_speak_http_is_one_line(odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", odd["url"])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    odd["words"] = b"HTTP/1.1 abc OK\r\n\r\n"
    with pytest.raises(UnreachableError, match="does not speak HTTP"):
        config_json._get("org/model", "main")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"\xff\xfe\x00\x01",
        b"",
        HEAD + b"\r\n" + b"[" * 100_000,
        HEAD + b'\r\n{"pods": [' + b"9" * 6000 + b"]}",
        HEAD + b"\r\n\xff\xfe\xff",
        HEAD + b"Content-Encoding: gzip\r\n\r\nno gzip at all",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n{}",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::bad\r\nConnection: close\r\n\r\n",
    ],
    ids=[
        "words",
        "status",
        "bytes",
        "nothing",
        "nested",
        "digits",
        "no utf-8",
        "no gzip",
        "no chunks",
        "headers",
        "to",
    ],
)
def test_an_answer_that_is_none_is_told_in_words(api: Api, odd: dict[str, Any], words: bytes) -> None:
    odd["words"] = words
    with pytest.raises(RunnerError):
        api.pods()
    with pytest.raises(UnclearError):
        api.create_pod(PodRequest("runner-a-1", IMAGE, "secure", gpu_id="NVIDIA L4"))


def test_logs_that_drip_end(api: Api, odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.cloud.runpod.api.LOG_SILENCE_S", 0.5)
    odd |= {"words": HEAD.replace(b"application/json", b"text/event-stream") + b"\r\ndata" + b":" * 2000, "pause": 0.01}
    began = time.monotonic()
    assert list(api.logs("a")) == []
    assert time.monotonic() - began < 8
