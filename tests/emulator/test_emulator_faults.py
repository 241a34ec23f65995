"""What goes wrong with an emulated RunPod when it is told to: each fault, as a client meets it."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
import runpod
from runpod.error import AuthenticationError, QueryError

from runner.emulator.faults import KINDS, Fault, parsed
from tests.support.emulated import Emulator, needs_sshd, pod_body, rest, ssh, until
from tests.support.front import runner

L4, A40 = "NVIDIA L4", "NVIDIA A40"


def create(**more: Any) -> Any:
    """A pod by the SDK's own request."""
    return rest("POST", "/v2/pods", pod_body(**more))


def refused(request: Callable[[], Any]) -> QueryError:
    """The SDK's error for a request that must be refused."""
    with pytest.raises(QueryError) as caught:
        request()
    return caught.value


@pytest.mark.parametrize("status", [402, 403, 404, 409, 422, 429, 500, 502, 503])
def test_an_error_in_place_of_an_answer_and_nothing_done(emulator: Emulator, status: int) -> None:
    emulator.inject("answer", on="create", status=status)
    error = refused(create)
    assert error.status_code == status and emulator.pods() == {}
    assert ("<html>" in str(error)) == (status == 502)
    assert create()["status"] == "PROVISIONING"  # once is once


def test_a_create_that_is_carried_out_twice(emulator: Emulator) -> None:
    emulator.inject("double", on="create")
    made = create()
    assert made["id"] in emulator.pods() and len(emulator.pods()) == 2
    assert {pod.name for pod in emulator.pods().values()} == {made["name"]}


def test_401_is_an_error_of_its_own(emulator: Emulator) -> None:
    emulator.inject("answer", on="list", status=401, times=0)
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            runpod.get_pods()
    emulator.clear()
    assert runpod.get_pods() == []


def test_429_says_how_long_to_wait(emulator: Emulator) -> None:
    emulator.inject("answer", on="reads", status=429, retry_after=7)
    answer = requests.get(f"{emulator.url}/v2/pods", headers={"Authorization": f"Bearer {emulator.key}"}, timeout=10)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")


@pytest.mark.parametrize("commit", [True, False])
def test_a_lost_answer_says_nothing_about_the_pod(emulator: Emulator, commit: bool) -> None:
    emulator.inject("lost", on="create", commit=commit)
    with pytest.raises(requests.ConnectionError):
        create()
    assert len(emulator.pods()) == commit
    assert emulator.exchanges[-1].status == 0


def test_an_answer_may_come_after_the_clients_patience(emulator: Emulator) -> None:
    emulator.inject("timeout", on="create", seconds=1.5)
    headers = {"Authorization": f"Bearer {emulator.key}"}
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{emulator.url}/v2/pods", json=pod_body(), headers=headers, timeout=0.4)
    assert len(emulator.pods()) == 1
    emulator.inject("timeout", on="get", seconds=0.3)
    assert rest("GET", f"/v2/pods/{next(iter(emulator.pods()))}")["name"] == "a-pod"


def test_no_capacity_for_a_gpu_a_cloud_or_a_data_center(emulator: Emulator) -> None:
    emulator.inject("no_capacity", gpu=L4, times=2)
    emulator.inject("no_capacity", cloud="COMMUNITY", detail="not enough free GPUs on the host machine")
    emulator.inject("no_capacity", data_center="US-TX-3", times=0)
    for _ in range(2):
        error = refused(create)
        assert error.status_code == 400 and "no longer any instances available" in str(error)
    create()
    assert "host machine" in str(refused(lambda: create(cloud="COMMUNITY", gpu={"id": "NVIDIA RTX A4000"})))
    assert "instances" in str(refused(lambda: create(dataCenterIds=["US-TX-3"])))
    pod = create(dataCenterIds=["US-TX-3", "EU-SE-1"])
    until(lambda: rest("GET", f"/v2/pods/{pod['id']}")["dataCenterId"] == "EU-SE-1")


def test_catalogue_and_create_agree_on_stock(emulator: Emulator) -> None:
    params = {"include": "AVAILABILITY", "product": "POD"}
    assert rest("GET", f"/v2/catalog/gpus/{A40}", params=params)["availability"] == "HIGH"
    emulator.inject("no_capacity", gpu=A40, times=0)
    gpu = runpod.get_gpu(A40)
    assert gpu["availability"] == "NONE" and {c["availability"] for c in gpu["dataCenters"]} == {"NONE"}
    assert refused(lambda: create(gpu={"id": A40})).status_code == 400


def test_a_stopped_pod_may_find_its_gpus_taken(emulator: Emulator) -> None:
    pod = create()
    runpod.stop_pod(pod["id"])
    emulator.inject("no_capacity", on="start")
    assert "not enough free GPUs on the host machine" in str(refused(lambda: runpod.resume_pod(pod["id"])))
    assert runpod.resume_pod(pod["id"])["status"] == "PROVISIONING"


def test_slow_pull_and_bad_host(emulator: Emulator) -> None:
    emulator.inject("slow_pull", seconds=1.0, pod="slow")
    emulator.inject("bad_host", pod="bad")
    slow, bad = create(name="slow"), create(name="bad")
    until(lambda: rest("GET", f"/v2/pods/{slow['id']}")["status"] == "STARTING")
    began = time.monotonic()
    until(lambda: rest("GET", f"/v2/pods/{slow['id']}")["status"] == "RUNNING")
    assert time.monotonic() - began > 0.5
    found = rest("GET", f"/v2/pods/{bad['id']}")
    assert (found["status"], found["dataCenterId"], found["ssh"]["proxy"]) == ("PROVISIONING", None, None)


def test_an_image_that_is_never_there(emulator: Emulator) -> None:
    emulator.inject("no_pull", detail="manifest unknown")
    pod = create()
    until(lambda: rest("GET", f"/v2/pods/{pod['id']}")["status"] == "STARTING")
    time.sleep(1.0)  # a pull takes none here
    assert rest("GET", f"/v2/pods/{pod['id']}")["status"] == "STARTING"
    runpod.terminate_pod(pod["id"])
    assert emulator.pods() == {}


def test_a_price_higher_than_the_catalogues(emulator: Emulator) -> None:
    emulator.inject("price", factor=1.55)
    assert create()["cost"] == pytest.approx(0.49 * 1.55, abs=1e-3)
    assert create()["cost"] == pytest.approx(0.49)


def test_a_created_pod_may_be_missing_from_lists_for_a_while(emulator: Emulator) -> None:
    emulator.inject("late_listing", seconds=0.8)
    pod = create()
    assert runpod.get_pods() == [] and runpod.get_pod(pod["id"])["id"] == pod["id"]
    until(lambda: [p["id"] for p in runpod.get_pods()] == [pod["id"]])


def test_terminate_may_be_answered_and_not_done(emulator: Emulator) -> None:
    emulator.inject("undead", times=2)
    pod = create()
    for _ in range(2):
        runpod.terminate_pod(pod["id"])
        assert runpod.get_pod(pod["id"]) is not None
    runpod.terminate_pod(pod["id"])
    assert runpod.get_pod(pod["id"]) is None
    emulator.inject("undead", seconds=0.5)
    late = create()
    runpod.terminate_pod(late["id"])
    assert runpod.get_pod(late["id"]) is not None
    until(lambda: runpod.get_pod(late["id"]) is None)


def test_a_pod_without_the_right_to_end_itself(emulator: Emulator) -> None:
    pod = create()
    own = emulator.pods()[pod["id"]].key
    emulator.inject("no_right", pod=pod["id"], times=0)
    assert refused(lambda: rest("DELETE", f"/v2/pods/{pod['id']}", key=own)).status_code == 403
    assert rest("GET", f"/v2/pods/{pod['id']}", key=own)["id"] == pod["id"]
    rest("DELETE", f"/v2/pods/{pod['id']}")  # with the account's key


@needs_sshd
def test_preemption_with_a_warning_and_without(emulator: Emulator) -> None:
    emulator.world.settings.warning_s = 0.7
    script = "bash -c 'trap \"echo warned\" TERM; echo up; while true; do sleep 0.05; done'"
    for warning in (True, False):
        pod = create(name=f"spot-{warning}", args=script)
        log = emulator.pods()[pod["id"]].log
        until(lambda log=log: "up" in [line.text for line in log.lines()])
        emulator.inject("preempt", pod=pod["id"], warning=warning)
        until(lambda pod=pod: rest("GET", f"/v2/pods/{pod['id']}")["status"] == "EXITED")
        assert ("warned" in [line.text for line in log.lines()]) == warning


@needs_sshd
def test_a_container_that_restarts_loses_its_disk_and_gets_a_new_port(emulator: Emulator, key_pair: Path) -> None:
    disk = {"persistent": {"size": 10, "path": "/workspace"}}
    pod = rest("POST", "/v2/pods", pod_body(key_pair, mounts=disk))
    ssh(pod["id"], key_pair, "touch ~/.here")
    port = rest("GET", f"/v2/pods/{pod['id']}")["ssh"]["direct"]["port"]
    emulator.inject("restart", pod=pod["id"])
    until(lambda: emulator.pods()[pod["id"]].restarts == 1)
    assert "no" in ssh(pod["id"], key_pair, "test -e /root/.here || echo no").stdout
    assert rest("GET", f"/v2/pods/{pod['id']}")["ssh"]["direct"]["port"] != port


def test_a_pod_may_vanish(emulator: Emulator) -> None:
    emulator.inject("vanish", pod="next-one", seconds=0.2)  # it is to come
    pod = create(name="next-one")
    until(lambda: runpod.get_pod(pod["id"]) is None)
    assert runpod.get_pods() == []


@needs_sshd
def test_a_pod_that_runs_and_cannot_be_reached(emulator: Emulator, key_pair: Path) -> None:
    emulator.inject("no_ssh")
    pod = rest("POST", "/v2/pods", pod_body(key_pair))
    direct = until(lambda: rest("GET", f"/v2/pods/{pod['id']}")["ssh"]["direct"])
    words = ["ssh", "-o", "BatchMode=yes", "-p", str(direct["port"]), f"{direct['username']}@127.0.0.1"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 255


def test_a_server_whose_clock_is_ahead(emulator: Emulator) -> None:
    emulator.inject("skew", seconds=3600)
    answer = requests.get(f"{emulator.url}/v2/pods", headers={"Authorization": f"Bearer {emulator.key}"}, timeout=10)
    assert 3590 < parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time() < 3610


def test_the_first_may_pass(emulator: Emulator) -> None:
    emulator.inject("answer", on="list", status=500, skip=2)
    runpod.get_pods()
    runpod.get_pods()
    assert refused(runpod.get_pods).status_code == 500


def test_another_process_injects_by_http(emulator: Emulator) -> None:
    def call(method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(emulator.url + path, data, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    made = call("POST", "/_emulator/faults", {"kind": "no_capacity", "gpu": L4})
    assert refused(create).status_code == 400
    listed = call("GET", "/_emulator/faults")
    assert [fault["used"] for fault in listed["faults"]] == [1] and listed["kinds"] == KINDS
    call("DELETE", f"/_emulator/faults/{made['id']}")
    assert call("GET", "/_emulator/faults")["faults"] == []
    pod = create()
    assert call("POST", "/_emulator/faults", {"kind": "vanish", "pod": pod["id"]})["struck"] == [pod["id"]]
    until(lambda: runpod.get_pod(pod["id"]) is None)
    assert call("POST", "/_emulator/clock", {"speed": 60, "advance_s": 7200})["billed_s"] >= 7200
    assert [p["status"] for p in call("GET", "/_emulator/pods")["pods"]] == ["TERMINATED"]
    with pytest.raises(urllib.error.HTTPError, match="422"):
        call("POST", "/_emulator/faults", {"kind": "earthquake"})
    with pytest.raises(urllib.error.HTTPError, match="422"):
        call("POST", "/_emulator/faults", {"kind": "lost", "gpus": L4})


def test_faults_of_the_command_line() -> None:
    fault = parsed("no_capacity:gpu=NVIDIA L4, times=2")
    assert (fault.kind, fault.gpu, fault.times) == ("no_capacity", "NVIDIA L4", 2)
    assert parsed("preempt:warning=false,seconds=1.5").warning is False
    for text, words in (("quake", "no fault"), ("lost:when=now", "not one of"), ("lost:times=often", "no number")):
        with pytest.raises(ValueError, match=words):
            parsed(text)


def test_every_kind_is_tested_here_and_told_in_the_docs() -> None:
    here = Path(__file__).read_text("utf-8")
    page = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text("utf-8")
    for kind, meaning in KINDS.items():
        assert f'"{kind}"' in here and Fault(kind).kind == kind
        assert f"| `{kind}` | {meaning} |" in page


def test_the_verb_refuses_in_words() -> None:
    done = runner("emulate", "--fault", "quake", "--fault", "lost:when=now")
    assert done.exit_code == 2 and "'quake' is no fault" in done.output and "'when=now' is not one of" in done.output
    assert runner("emulate", "--port", "99999").exit_code == 2


@needs_sshd
def test_the_verb_refuses_a_port_in_use(emulator: Emulator) -> None:
    done = runner("emulate", "--port", emulator.url.rpartition(":")[2])
    assert done.exit_code == 2 and "cannot be listened on" in done.output and "leave --port out" in done.output


def test_the_verb_needs_sshd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.emulator.server.sshd", lambda: None)
    done = runner("emulate")
    assert done.exit_code == 3 and "apt-get install openssh-server" in done.output
