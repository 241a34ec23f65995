"""API keys that may do less than the account: one line says what permission is missing, before anything is rented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.cloud.ledger import Ledger
from runner.cloud.provider import PodRequest
from runner.cloud.runpod.runpod_provider import RunPod
from runner.machine import detect
from tests.support.emulated import IMAGE, Emulator
from tests.support.front import LAPTOP, runner

pytestmark = pytest.mark.usefixtures("state", "here")
RUN = (
    "model=smollm2_135m",
    "method=lora",
    "hw=rtx4090",
    "where=runpod",
    "train.max_steps=2",
    "where.setup_minutes=0.2",
)
BID = ("where.spot=true", "where.bid_usd=0.5")
MAY_NOT = "RUNPOD_API_KEY is accepted, and may not "


def use(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    key = emulator.restricted_key(kind)
    monkeypatch.setenv("RUNPOD_API_KEY", key)
    monkeypatch.setattr("runpod.api_key", key)


def said(*words: str, code: int) -> str:
    result = runner(*words)
    text = " ".join(result.output.split())
    assert result.exit_code == code, text
    assert "Traceback" not in text and "rpa_" not in text and "MAY STILL BE RUNNING" not in text
    return text


@pytest.mark.parametrize(
    ("kind", "words", "may_not"),
    [
        ("read_only", (*RUN, "--yes"), "rent a pod"),
        ("no_pods", (*RUN, "--yes"), "rent a pod"),
        ("no_graphql", (*RUN, *BID, "--yes"), "bid for spot machines, which takes GraphQL"),
        ("read_only", (*RUN, *BID, "--yes"), "bid for spot machines, which takes GraphQL"),
        ("read_only", ("pods", "up", "hw=rtx4090", "--hours", "1", "--yes"), "rent a pod"),
        ("no_pods", ("pods",), "look at pods"),
        ("no_pods", ("volumes",), "look at network volumes"),
        ("read_only", ("volumes", "create", "x", "--size", "10", "--data-center", "EU-RO-1"), "make a network volume"),
    ],
)
def test_what_a_key_may_not_do_is_one_line_and_nothing_is_rented(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, kind: str, words: tuple[str, ...], may_not: str
) -> None:
    use(emulator, monkeypatch, kind)
    text = said(*words, code=2)
    assert text.count(MAY_NOT) == 1 and f"{MAY_NOT}{may_not}: access denied" in text
    assert "Read/Write" in text and "console.runpod.io/user/settings" in text
    assert emulator.pods() == {} and Ledger().entries() == []


@pytest.mark.usefixtures("hello")
def test_a_key_without_graphql_rents_all_the_same(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    use(emulator, monkeypatch, "no_graphql")
    assert "pod " in said("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "1", "--yes", code=0)
    assert len(emulator.pods()) == 1


@pytest.mark.parametrize("kind", ["read_only", "no_graphql", "no_pods"])
def test_a_plan_and_the_catalogue_need_no_more_than_that(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    use(emulator, monkeypatch, kind)
    assert "RunPod's catalogue" in said("plan", *RUN, code=0)
    assert "NVIDIA A40" in said("gpus", code=0)


@pytest.mark.parametrize(
    ("kind", "more", "judged", "found"),
    [
        ("read_only", (), "ok", "set, and accepted: the account has $100.00"),
        ("no_graphql", (), "ok", "it cannot read the balance"),
        ("no_graphql", BID, "problem", "bid for spot machines, which takes GraphQL"),
        ("no_pods", (), "problem", f"{MAY_NOT}look at pods: access denied"),
    ],
)
def test_doctor_asks_whether_the_key_is_accepted(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, kind: str, more: tuple[str, ...], judged: str, found: str
) -> None:
    use(emulator, monkeypatch, kind)
    monkeypatch.setattr(detect, "detect", lambda *_: LAPTOP)
    rows = json.loads(runner("doctor", *RUN, *more, "--json").stdout)
    (row,) = (row for row in rows["checks"] if row["name"] == "RUNPOD_API_KEY")
    assert row["state"] == judged and found in row["found"]
    assert all(e.method == "GET" or e.path == "/graphql" for e in emulator.exchanges)


def test_a_pod_that_a_key_may_not_end_is_said_to_run(
    emulator: Emulator, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = RunPod().create_pod(PodRequest("runner-a-0001", IMAGE, "secure", gpu_id="NVIDIA L4"))
    use(emulator, monkeypatch, "read_only")
    result = runner("pods", "terminate", pod.id)
    text = " ".join(result.output.split())
    assert result.exit_code == 1 and f"POD {pod.id} (runner-a-0001) MAY STILL BE RUNNING AND COST MONEY" in text
    assert f"{MAY_NOT}end a pod" in text and list(emulator.pods()) == [pod.id]
    stopped = runner("pods", "stop", pod.id)
    assert stopped.exit_code == 1 and f"{MAY_NOT}start or stop a pod" in " ".join(stopped.output.split())
