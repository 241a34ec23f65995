"""The verbs pods, gpus and volumes, against an emulated RunPod."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.lease import Lease
from runner.cloud.ledger import Ledger, LedgerError
from runner.cloud.provider import PodRequest
from runner.cloud.runpod.runpod_provider import RunPod
from runner.emulator.container import free_port
from runner.errors import Problem
from tests.support.emulated import IMAGE, Emulator, emulator, needs_sshd, until
from tests.support.front import here, laptop, runner
from tests.support.leaks import Watch
from tests.support.processes import start
from tests.support.rented import state

__all__ = ["emulator", "here", "laptop", "state"]
pytestmark = pytest.mark.usefixtures("state", "here")


def answered(*words: str, code: int = 0) -> Any:
    result = runner(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def elsewhere(name: str = "runner-demo-20261125-abcd-0001", **env: str) -> str:
    """A pod that another machine has rented."""
    return RunPod().create_pod(PodRequest(name, IMAGE, "secure", gpu_id="NVIDIA L4", env=env)).id


@needs_sshd
def test_a_pod_of_ones_own_from_up_to_terminate(emulator: Emulator, here: Path) -> None:
    words = ("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes")
    made = answered(*words)
    assert made["usd_per_hour"] == 0.74 and made["deadline"] == pytest.approx(time.time() + 3 * 3600, abs=120)
    (row,) = answered("pods")
    assert (row["pod_id"], row["state"], row["status"]) == (made["pod_id"], "RUNNING", "RUNNING")
    assert row["run_id"] == made["run_id"] and row["usd"] > 0 and not row["held"]
    assert made["pod_id"] in runner("pods", "list").output
    assert answered("pods", "reap", "--yes") == {"ended": [], "stopped": []}  # it is within its deadline
    assert answered("pods", "stop", made["run_id"])["state"] == "stopped"
    assert answered("pods")[0]["state"] == "STOPPED" and answered("pods")[0]["usd_per_hour"] == 0
    assert answered("pods", "terminate", made["pod_id"]) == {"pod_id": made["pod_id"], "state": "gone"}
    assert answered("pods") == [] and emulator.pods() == {}
    assert not (here / "runs").exists()


@needs_sshd
def test_a_tunnel_carries_http_until_ctrl_c_and_says_where_before(emulator: Emulator, state: Path) -> None:
    made = answered("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes")
    local, there = free_port(), free_port()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(state))
    with http.server.ThreadingHTTPServer(("127.0.0.1", there), handler) as server:  # the pods' loopback is this one
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ("pods", "tunnel", made["run_id"], "-p", f"{local}:{there}")
        process = start(*words, **emulator.env, RUNNER_STATE=str(state))
        try:
            assert process.stderr is not None
            assert f"http://127.0.0.1:{local}  port {there} of the pod" in process.stderr.readline()
            assert process.stderr.readline().strip() == "Ctrl-C ends it"
            for _ in range(2):
                answer = urllib.request.urlopen(f"http://127.0.0.1:{local}/", timeout=10)
                assert answer.status == 200 and b"ledger" in answer.read()
            assert process.poll() is None
            taken = runner(*words)
            assert taken.exit_code == 2 and f"port {local} of this machine: Address already in use" in taken.output
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        finally:
            process.kill()
            server.shutdown()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{local}/", timeout=2)
    assert runner("pods", "tunnel", made["run_id"], "-p", "70000").exit_code == 2
    assert answered("pods", "terminate", made["pod_id"])["state"] == "gone"


@needs_sshd
def test_a_tunnel_of_two_ports_of_which_one_has_no_server_and_that_is_interrupted(
    emulator: Emulator, state: Path
) -> None:
    made = answered("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes")
    one, two, there, silent = (free_port() for _ in range(4))
    twice = runner("pods", "tunnel", made["run_id"], "-p", f"{one}:1", "-p", f"{one}:2")
    assert twice.exit_code == 2 and f"port {one} of this machine is named twice" in twice.output
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(state))
    with http.server.ThreadingHTTPServer(("127.0.0.1", there), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ("pods", "tunnel", made["run_id"], "-p", f"{one}:{there}", "-p", f"{two}:{silent}")
        process = start(*words, **emulator.env, RUNNER_STATE=str(state))
        try:
            assert process.stderr is not None
            said = [process.stderr.readline() for _ in range(3)]
            assert f":{one}  port {there}" in said[0] and f":{two}  port {silent}" in said[1], said
            with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
                urllib.request.urlopen(f"http://127.0.0.1:{two}/", timeout=10)
            for _ in range(2):  # which leaves the other one alone
                assert urllib.request.urlopen(f"http://127.0.0.1:{one}/", timeout=10).status == 200
            emulator.inject("vanish", pod=made["pod_id"])
            assert process.wait(60) == 1
            told = process.stderr.read()
            assert f"the connection to pod {made['pod_id']} broke" in told and "Traceback" not in told, told
        finally:
            process.kill()
            server.shutdown()


@needs_sshd
@pytest.mark.parametrize("taken", [0, 1])
def test_a_tunnel_of_which_one_local_port_is_taken_opens_none(emulator: Emulator, state: Path, taken: int) -> None:
    made = answered("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = [other.getsockname()[1], free_port()][:: 1 if taken == 0 else -1]
        words = ["pods", "tunnel", made["run_id"], *(word for port in ports for word in ("-p", f"{port}:8888"))]
        result = runner(*words)
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and f"port {ports[taken]} of this machine: Address already in use" in said
        assert f"--port {10000 + ports[taken] % 50000}:8888" in said and "Ctrl-C" not in said
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports[1 - taken]), timeout=1)


@needs_sshd
def test_up_passes_variables_by_name_and_no_request_or_argument_has_their_values(
    emulator: Emulator, here: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    monkeypatch.setenv("MY_KEY", "it's a s3cr3t")
    passed = ("-e", "HF_TOKEN", "-e", "MY_KEY")
    words = ("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes", *passed)
    with Watch(["hf_s3cr3t", "it's a s3cr3t"], [state], private=state / "keys") as watch:
        made = answered(*words)
    assert watch.found == set() and watch.looks
    assert not any("s3cr3t" in str(e.body) for e in emulator.exchanges)
    for command in (["printenv", "HF_TOKEN", "MY_KEY"], ["bash", "-ic", "'printenv HF_TOKEN MY_KEY'"]):
        capfd.readouterr()
        assert runner("pods", "ssh", made["pod_id"], *command).exit_code == 0
        assert capfd.readouterr().out.splitlines() == ["hf_s3cr3t", "it's a s3cr3t"]
    assert answered("pods", "terminate", made["pod_id"])["state"] == "gone"


def test_a_deadline_that_never_comes_is_refused_before_anything_is_rented(emulator: Emulator) -> None:
    result = runner("pods", "up", "hw=rtx4090", "--hours", "1e300", "--yes")
    assert result.exit_code == 2 and "--hours 1e+300: no pod is rented for more than 8784 hours" in result.output
    assert not any(e.method == "POST" for e in emulator.exchanges)


@pytest.mark.parametrize("fails", ["set", "detach"])
def test_a_pod_that_cannot_be_recorded_as_ones_own_is_given_back(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError(Problem("the ledger cannot be written: database or disk is full"))

    monkeypatch.setattr("runner.cloud.readiness.says_hello", lambda host, port: True)
    monkeypatch.setattr(*{"set": (Ledger, "set", full), "detach": (Lease, "detach", full)}[fails])
    result = runner("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes")
    assert result.exit_code == 1 and "cannot be written" in result.output
    assert any(e.method == "POST" for e in emulator.exchanges) and emulator.pods() == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("HF_TOKEN=hf_x", "export it, and write --env HF_TOKEN"),
        ("NOT_THERE", "'NOT_THERE' is not set here"),
        ("RUNPOD_API_KEY", "may end every other pod"),
    ],
)
def test_up_refuses_what_cannot_or_may_not_be_passed(emulator: Emulator, word: str, said: str) -> None:
    result = runner("pods", "up", "hw=rtx4090", "--hours", "3", "--yes", "--env", word)
    assert result.exit_code == 2 and said in " ".join(result.output.split()) and "hf_x" not in result.output
    assert not any(e.method == "POST" for e in emulator.exchanges)


@pytest.mark.slow
@needs_sshd
def test_a_stopped_pod_is_started_for_a_while_and_stops_itself(
    emulator: Emulator, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "my")
    words = ("pods", "up", "hw=rtx4090", "where.max_usd=5", "where.volume_gb=20", "--hours", "3", "--yes")
    made = answered(*words)
    refused = runner("pods", "start", made["pod_id"], "--hours", "1", "--yes")
    assert refused.exit_code == 2 and "is running, and not stopped" in refused.output
    assert runner("pods", "ssh", made["pod_id"], "touch", "/workspace/mine").exit_code == 0
    answered("pods", "stop", made["run_id"])
    started = answered("pods", "start", made["run_id"], "--hours", "0.005", "--yes", "--env", "MY_KEY")
    assert started["pod_id"] == made["pod_id"] and started["usd_per_hour"] == 0.74
    assert started["deadline"] == pytest.approx(time.time() + 18, abs=15)
    assert answered("pods")[0]["state"] == "RUNNING"
    capfd.readouterr()
    assert runner("pods", "ssh", made["pod_id"], "ls", "/workspace/mine;", "printenv", "MY_KEY").exit_code == 0
    assert capfd.readouterr().out.split() == ["/workspace/mine", "my"]
    until(lambda: [pod.status for pod in emulator.pods().values()] == ["EXITED"], 60)
    assert answered("pods")[0]["state"] == "STOPPED"
    assert answered("pods", "terminate", made["pod_id"])["state"] == "gone"


NVIDIA_SMI = """#!/bin/sh
echo '0, NVIDIA GeForce RTX 4090, 97, 20480, 24564, 401.50, 450.00, 66'
echo '1, NVIDIA GeForce RTX 4090, [N/A], 512, 24564, [N/A], 450.00, 41'
"""


@needs_sshd
def test_top_shows_what_the_gpus_do(emulator: Emulator, here: Path) -> None:
    made = answered("pods", "up", "hw=rtx4090", "where.max_usd=5", "--hours", "3", "--yes")
    result = runner("pods", "top", made["run_id"])
    assert result.exit_code == 3 and "it has no GPU" in result.output
    (disk,) = (here / "emulator").glob("**/disk/image/bin")
    (disk / "nvidia-smi").write_text(NVIDIA_SMI)
    (disk / "nvidia-smi").chmod(0o755)
    one, two = answered("pods", "top", made["run_id"])
    assert (one["utilisation_percent"], one["memory_used_mib"], one["temperature_c"]) == (97, 20480, 66)
    assert two["utilisation_percent"] is None and two["power_w"] is None
    shown = " ".join(runner("pods", "top", made["run_id"], "--once").output.split())
    assert "0 NVIDIA GeForce RTX 4090 97% 20.0 of 24.0 402 of 450 66" in shown
    assert answered("pods", "terminate", made["pod_id"])["state"] == "gone"


def test_all_shows_other_pods_and_no_verb_touches_them(emulator: Emulator) -> None:
    own, other = elsewhere(), elsewhere("somebody-else")
    assert [row["pod_id"] for row in answered("pods")] == [own]
    rows = {row["pod_id"]: row for row in answered("pods", "--all")}
    assert set(rows) == {own, other} and rows[other]["state"] == "NOT OURS" and rows[other]["usd_per_hour"] > 0
    assert "somebody-else" in runner("pods", "list", "--all").output
    for verb in (["stop"], ["start", "--hours", "1"], ["terminate"]):
        assert runner("pods", *verb, other).exit_code == 2
    assert set(emulator.pods()) == {own, other}


def test_up_refuses_what_costs_more_than_the_cap(emulator: Emulator) -> None:
    result = runner("pods", "up", "hw=rtx4090", "where.max_usd=1", "--hours", "3", "--yes")
    assert result.exit_code == 3 and "write --hours 1.4" in result.output
    assert emulator.pods() == {}


def test_reap_ends_what_is_past_its_deadline_and_all_only_if_asked(emulator: Emulator) -> None:
    late = elsewhere("runner-a-0001", RUNNER_DEADLINE=str(time.time() - 60), RUNNER_RUN_ID="a")
    young = elsewhere("runner-b-0001", RUNNER_DEADLINE=str(time.time() + 3600))
    kept = elsewhere("runner-c-0001", RUNNER_DEADLINE=str(time.time() - 60))
    RunPod().stop(kept)
    other = elsewhere("somebody-else")
    assert {row["state"] for row in answered("pods")} == {"ELSEWHERE"}
    assert answered("pods", "reap", "--yes")["ended"] == [late]
    assert set(emulator.pods()) == {young, kept, other}
    assert answered("pods", "reap", "--all", "--yes") == {"ended": [young, kept], "stopped": []}
    assert set(emulator.pods()) == {other}  # never one that is not this project's
    assert runner("pods", "terminate", other).exit_code == 2


def test_reap_says_what_it_cannot_judge(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something on the way to RunPod takes the header Date away."""
    late = elsewhere("runner-a-0001", RUNNER_DEADLINE=str(time.time() + 60), RUNNER_RENTED=str(time.time()))
    emulator.clock.skew_s = 36_000
    with monkeypatch.context() as patched:
        patched.setattr(RunPod, "time", lambda self: None)
        result = runner("pods", "reap", "--yes")
    assert "nothing to end" in result.output and f"past their deadline: {late}; " in " ".join(result.stderr.split())
    assert answered("pods", "reap", "--yes")["ended"] == [late]


def test_an_end_that_cannot_be_confirmed_is_exit_1_with_the_pod_and_the_command(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.cloud.termination.LEAST_PATIENCE_S", 0.3)
    monkeypatch.setattr("runner.cloud.termination.PATIENCE_S", 0.3)
    pod = elsewhere()
    emulator.inject("undead", times=0)
    result = runner("pods", "terminate", pod)
    assert result.exit_code == 1 and "MAY STILL BE RUNNING" in result.output and pod in result.output
    (entry,) = Ledger().entries()
    assert entry.state == "TERMINATING"


@pytest.mark.parametrize("words", [("pods",), ("gpus",), ("volumes",)])
def test_without_a_key_or_with_a_wrong_one(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_wrong")
    Ledger()
    result = runner(*words)
    assert result.exit_code == 2 and "does not accept RUNPOD_API_KEY" in result.output
    assert "rpa_wrong" not in result.output
    monkeypatch.delenv("RUNPOD_API_KEY")
    result = runner(*words)
    assert result.exit_code == 2 and "RUNPOD_API_KEY is not set" in result.output


def test_a_word_that_means_no_pod(emulator: Emulator) -> None:
    pod = elsewhere()
    result = runner("pods", "terminate", f"{pod}x")
    assert result.exit_code == 2 and f"did you mean {pod}?" in result.output
    assert runner("pods", "ssh", "nowhere").exit_code == 2
    assert runner("pods", "tunnel", pod, "-p", "all").exit_code == 2


def test_gpus_have_prices_stock_and_what_they_hold(emulator: Emulator) -> None:
    rows = {row["id"]: row for row in answered("gpus", "--min-memory", "40", "--cloud", "secure")}
    a40 = rows["NVIDIA A40"]
    assert (a40["memory_gb"], a40["secure_usd"], a40["hw"], a40["stock"]) == (48, 0.44, "a40", "HIGH")
    assert "qlora4" in a40["holds"] and "NVIDIA L4" not in rows
    assert (a40["host_memory_gib"], a40["vcpus"]) == (46, 9)
    assert "NVIDIA A40" in runner("gpus").output


def test_gpus_of_a_country(emulator: Emulator) -> None:
    rows = {row["id"]: row for row in answered("gpus", "--country", "se", "--min-memory", "80")}
    assert rows["NVIDIA H200"]["data_centers"] == ["EU-SE-1"] and "NVIDIA B200" not in rows
    assert "EU-RO-1, US-KS-2" in " ".join(runner("gpus", "--min-memory", "150").output.split())
    result = runner("gpus", "--country", "DE")
    assert result.exit_code == 2 and "it has data centres in CA, RO, SE, US" in result.output
    assert runner("gpus", "--country", "Sweden").exit_code == 2


def test_templates_are_searched_by_every_word(emulator: Emulator) -> None:
    api = RunPod()
    own = api.create_template({"name": "My own Torch", "image": "me/torch:1"})
    assert [(row["id"], row["source"]) for row in answered("pods", "templates", "TORCH")] == [
        (own, "own"), ("runpod-torch-v280", "official"),
    ]  # fmt: skip
    assert [row["id"] for row in answered("pods", "templates", "pytorch", "2.8")] == ["runpod-torch-v280"]
    assert answered("pods", "templates", "vllm") == []  # it is for serverless workers
    assert "No template for pods has 'no-such word'" in runner("pods", "templates", "no-such", "word").output
    sources = {e.query for e in emulator.exchanges if e.path == "/v2/catalog/templates"}
    assert sources == {"source=official", "source=verified", "source=community"}


def test_volumes_are_made_listed_filled_and_deleted(
    emulator: Emulator, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = answered("volumes", "create", "data", "--size", "100", "--data-center", "EU-RO-1")
    assert made["usd_per_month"] == 7.0
    assert runner("volumes", "create", "data", "--size", "100", "--data-center", "EU-RO-1").exit_code == 2
    result = runner("volumes", "create", "x", "--size", "100", "--data-center", "EU-RO-9")
    assert result.exit_code == 2 and "did you mean EU-RO-1?" in result.output
    (here / "corpus").mkdir()
    (here / "corpus" / "a.txt").write_text("a" * 10)
    result = runner("volumes", "put", "data", "corpus", "datasets")
    assert result.exit_code == 2 and "AWS_ACCESS_KEY_ID" in result.output
    for name, value in emulator.serve_s3().items():
        monkeypatch.setenv(name, value)
    assert answered("volumes", "put", "data", "corpus", "datasets") == {"sent": ["datasets/a.txt"]}
    assert answered("volumes", "ls", "data") == [{"path": "datasets/a.txt", "size": 10}]
    answered("volumes", "get", "data", "datasets", "back")
    assert (here / "back" / "a.txt").read_text() == "a" * 10
    assert answered("volumes", "delete", "data", "--yes")["state"] == "gone"
    assert answered("volumes") == []


@pytest.mark.parametrize(
    "words", ["pods", "pods stop", "pods terminate", "pods ssh", "pods tunnel", "pods logs", "pods reap", "pods up",
              "pods start", "pods top", "pods templates", "gpus", "volumes"],
)  # fmt: skip
def test_help_has_an_example(words: str) -> None:
    result = runner(*words.split(), "--help")
    assert result.exit_code == 0 and f"python -m runner {words.split()[0]}" in result.output
