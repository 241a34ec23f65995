"""Emulated pods: the official SDK, unmodified, rents them, and ssh really is ssh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runpod

from runner.emulator.container import namespaces
from tests.conftest import ROOT
from tests.support.emulated import IMAGE, Emulator, needs_sshd, pod_body, rest, ssh, until

pytestmark = needs_sshd
isolated = pytest.mark.skipif(not namespaces(), reason="no right to make namespaces: a pod is but processes")
DISK = {"mounts": {"persistent": {"size": 10, "path": "/workspace"}}}


def running(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod, once the API has an address for it."""

    def ready() -> dict[str, Any] | None:
        found: dict[str, Any] = rest("GET", f"/v2/pods/{pod['id']}")
        return found if found["ssh"]["direct"] else None

    found: dict[str, Any] = until(ready)
    return found


def words_of(pod: dict[str, Any], key: Path, command: str) -> list[str]:
    """What a command in the pod writes, in words."""
    return ssh(pod["id"], key, command).stdout.split()


def workspace(emulator: Emulator, pod: dict[str, Any]) -> str:
    """Where the pod's volume is, for its processes."""
    if namespaces():
        return "/workspace"
    return next(line for line in words_in(emulator, pod) if line.startswith("export RUNNER_WORKSPACE=")).partition("=")[
        2
    ]


def environment_file(emulator: Emulator, pod: dict[str, Any]) -> str:
    """Where the pod's variables are written down, for its processes."""
    return ("" if namespaces() else f"{emulator.pods()[pod['id']].folder}/disk") + "/etc/rp_environment"


def words_in(emulator: Emulator, pod: dict[str, Any]) -> list[str]:
    """The lines of that file, where it is a file of the host."""
    running(pod)
    file = Path(environment_file(emulator, pod))
    return until(lambda: file.exists() and file.read_text("utf-8").splitlines())


def test_sdk_rents_stops_resumes_and_ends_a_pod(emulator: Emulator, key_pair: Path) -> None:
    public = key_pair.with_suffix(".pub").read_text("utf-8").strip()
    pod = runpod.create_pod(
        "by-the-sdk", IMAGE, "NVIDIA GeForce RTX 4090", cloud_type="SECURE", gpu_count=2, ports="22/tcp,8888/http",
        volume_in_gb=20, volume_mount_path="/workspace", container_disk_in_gb=30, env={"PUBLIC_KEY": public, "A": "b"},
    )  # fmt: skip
    assert pod["status"] == "PROVISIONING" and pod["cost"] == pytest.approx(2 * 0.74)
    assert words_of(pod, key_pair, "echo $((6 * 7))") == ["42"]
    assert [p["id"] for p in runpod.get_pods()] == [pod["id"]]
    assert runpod.stop_pod(pod["id"])["status"] == "EXITED"
    assert runpod.get_pod(pod["id"])["cost"] == 0
    runpod.resume_pod(pod["id"])
    assert running(pod)["gpu"] == {"id": "NVIDIA GeForce RTX 4090", "count": 2}
    runpod.terminate_pod(pod["id"])
    assert runpod.get_pod(pod["id"]) is None and runpod.get_pods() == [] and emulator.pods() == {}


def test_statuses_are_walked_and_ssh_comes_last(emulator: Emulator, key_pair: Path) -> None:
    emulator.world.settings.runtime_s = 0.3
    pod, seen = rest("POST", "/v2/pods", pod_body(key_pair)), []
    while not seen or not seen[-1][1]:
        now = rest("GET", f"/v2/pods/{pod['id']}")
        step = (now["status"], now["ssh"]["direct"] is not None)
        seen += [step] if step not in seen else []
    assert seen == [("PROVISIONING", False), ("STARTING", False), ("RUNNING", False), ("RUNNING", True)]


def test_only_the_right_key_opens_the_door(emulator: Emulator, key_pair: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    pod = rest("POST", "/v2/pods", pod_body(key_pair))
    assert ssh(pod["id"], key_pair, "true").returncode == 0
    with pytest.raises(AssertionError, match="waited in vain"):
        ssh(pod["id"], tmp_path / "other", "true", seconds=1)


def test_account_keys_open_pods_with_start_ssh(emulator: Emulator, key_pair: Path) -> None:
    public = key_pair.with_suffix(".pub").read_text("utf-8").strip()
    runpod.update_user_settings(public)
    assert rest("GET", "/v2/account/ssh-keys") == {"keys": [public]}
    pod = rest("POST", "/v2/pods", pod_body(startSsh=True))
    assert "PUBLIC_KEY" not in pod["env"] and ssh(pod["id"], key_pair, "true").returncode == 0


def test_variables_are_in_a_file_and_not_in_the_shell(emulator: Emulator, key_pair: Path) -> None:
    pod = rest("POST", "/v2/pods", pod_body(key_pair, env={"GREETING": 'it\'s "me" & you'}))
    file = environment_file(emulator, pod)
    script = f'echo "[$GREETING$RUNPOD_POD_ID]"; . {file}; echo "[$GREETING]"; echo $RUNPOD_POD_ID $RUNPOD_TCP_PORT_22'
    bare, greeting, known = ssh(pod["id"], key_pair, script).stdout.splitlines()
    assert (bare, greeting) == ("[]", '[it\'s "me" & you]')
    assert known == f"{pod['id']} {running(pod)['ssh']['direct']['port']}"


@isolated
def test_a_pod_has_its_own_folders_and_processes_and_cannot_harm_the_host(emulator: Emulator, key_pair: Path) -> None:
    one, two = (rest("POST", "/v2/pods", pod_body(key_pair, name=n, **DISK)) for n in "ab")
    assert words_of(one, key_pair, "touch /workspace/w /root/r /tmp/t /dev/shm/s; hostname") == [one["id"]]
    shown = words_of(two, key_pair, "ls /workspace /tmp /dev/shm")  # a checkout below /tmp is seen where it lies
    assert [word for word in shown if word not in ROOT.parts] == ["/dev/shm:", "/tmp:", "/workspace:"]
    refused = ssh(two["id"], key_pair, f"touch /usr/x /etc/ssl/x {sys.prefix}/x {ROOT}/x")
    assert refused.stderr.count("Read-only file system") == 4 and not Path("/usr/x").exists()
    assert words_of(two, key_pair, "ps -eo comm | grep -c init_process.py; ps -p 1 -o pid=")[-1] == "1"
    assert int(words_of(two, key_pair, "ps -e | wc -l")[0]) < 12


def test_the_image_has_a_python_with_torch(emulator: Emulator, key_pair: Path) -> None:
    pod = rest("POST", "/v2/pods", pod_body(key_pair))
    script = "python3 -c 'import importlib.util as u, sys; print(sys.prefix, bool(u.find_spec(\"torch\")))'"
    assert words_of(pod, key_pair, script) == [sys.prefix, "True"]


def test_disks_live_as_long_as_runpods_do(emulator: Emulator, key_pair: Path) -> None:
    volume = rest("POST", "/v2/network-volumes", {"name": "v", "size": 10, "dataCenter": "EU-RO-1"})
    network = {"mounts": {"network": [{"volumeId": volume["id"], "path": "/workspace"}]}}
    pods = {name: rest("POST", "/v2/pods", pod_body(key_pair, name=name, **m)) for name, m in
            (("persistent", DISK), ("network", network))}  # fmt: skip
    home = "~" if namespaces() else "$HOME"
    for pod in pods.values():
        work = workspace(emulator, pod)
        ssh(pod["id"], key_pair, f"echo kept > {work}/file; echo lost > {home}/file")
        runpod.stop_pod(pod["id"])
        runpod.resume_pod(pod["id"])
        assert words_of(pod, key_pair, f"cat {work}/file; cat {home}/file") == ["kept"]
        assert running(pod)["dataCenterId"] == ("EU-RO-1" if pod["name"] == "network" else running(pod)["dataCenterId"])
        runpod.terminate_pod(pod["id"])
        assert not emulator.world.engine.past[-1].folder.exists()
    assert (emulator.world.root / "volumes" / volume["id"] / "file").read_text("utf-8") == "kept\n"
    rest("DELETE", f"/v2/network-volumes/{volume['id']}")
    assert not (emulator.world.root / "volumes" / volume["id"]).exists()


def test_a_command_of_ones_own_replaces_the_images(emulator: Emulator) -> None:
    own = {"args": "bash -c 'echo mine; sleep 60'", "env": {"PUBLIC_KEY": "ssh-ed25519 AAAA"}}
    pod = rest("POST", "/v2/pods", pod_body(**own))
    until(lambda: "mine" in [line.text for line in emulator.pods()[pod["id"]].log.lines()])
    assert not (emulator.pods()[pod["id"]].folder / "disk" / "root" / ".ssh").exists()  # nobody started sshd


def test_exiting_is_not_stopping(emulator: Emulator) -> None:
    pod = rest("POST", "/v2/pods", pod_body(args="bash -c 'echo once more; exit 3'"))
    log = emulator.pods()[pod["id"]].log
    until(lambda: [line.text for line in log.lines() if line.source == "container"].count("once more") >= 3)
    assert rest("GET", f"/v2/pods/{pod['id']}")["status"] == "RUNNING"
    assert any("exit code 3" in line.text for line in log.lines())


def test_what_cannot_be_started_is_an_error(emulator: Emulator) -> None:
    pod = rest("POST", "/v2/pods", pod_body(args="bash -c 'no end"))
    until(lambda: rest("GET", f"/v2/pods/{pod['id']}")["status"] == "ERROR")
    assert "No closing quotation" in emulator.pods()[pod["id"]].log.lines()[-1].text
    other = rest("POST", "/v2/pods", pod_body(args="no-such-program"))
    until(lambda: "exec no-such-program" in " ".join(x.text for x in emulator.pods()[other["id"]].log.lines()))


def test_ports_change_with_every_restart(emulator: Emulator, key_pair: Path) -> None:
    pod = rest("POST", "/v2/pods", pod_body(key_pair))
    before = running(pod)["ssh"]["direct"]["port"]
    rest("POST", f"/v2/pods/{pod['id']}/action", {"action": "restart"})
    assert ssh(pod["id"], key_pair, "true").returncode == 0
    assert running(pod)["ssh"]["direct"]["port"] != before


def test_a_pods_own_key_is_good_for_itself_only(emulator: Emulator, key_pair: Path) -> None:
    pod, other = (rest("POST", "/v2/pods", pod_body(key_pair, name=n)) for n in "ab")
    own = emulator.pods()[pod["id"]].key
    assert rest("GET", f"/v2/pods/{pod['id']}", key=own)["id"] == pod["id"]
    for method, path, body in (
        ("GET", f"/v2/pods/{other['id']}", None),
        ("DELETE", f"/v2/pods/{other['id']}", None),
        ("GET", "/v2/pods", None),
        ("POST", "/v2/pods", pod_body()),
        ("GET", "/v2/billing/pods", None),
        ("PATCH", f"/v2/pods/{pod['id']}", {"name": "x"}),
    ):
        with pytest.raises(runpod.error.QueryError) as caught:
            rest(method, path, body, key=own)
        assert caught.value.status_code == 403
    script = f""". {environment_file(emulator, pod)}; python3 -c 'import os, urllib.request as u; e = os.environ
u.urlopen(u.Request(e["RUNPOD_API_BASE_URL"] + "/v2/pods/" + e["RUNPOD_POD_ID"], method="DELETE",
          headers={{"Authorization": "Bearer " + e["RUNPOD_API_KEY"]}}))' >/dev/null 2>&1 &"""
    assert ssh(pod["id"], key_pair, script).returncode == 0
    until(lambda: pod["id"] not in emulator.pods())
    assert list(emulator.pods()) == [other["id"]]


def test_the_bill_runs_by_its_own_clock(emulator: Emulator) -> None:
    pod = rest("POST", "/v2/pods", pod_body(disk=73, **DISK))
    until(lambda: emulator.pods()[pod["id"]].segments)
    emulator.clock.advance(3600)
    running_usd = 0.49 + 0.10 * 83 / 730
    assert emulator.billed(pod["id"]) == pytest.approx(running_usd, abs=0.005)
    runpod.stop_pod(pod["id"])
    emulator.clock.advance(3600)
    assert emulator.billed(pod["id"]) == pytest.approx(running_usd + 0.20 * 10 / 730, abs=0.005)
    runpod.terminate_pod(pod["id"])
    total = emulator.billed(pod["id"])
    emulator.clock.advance(36_000)
    assert emulator.billed(pod["id"]) == emulator.billed() == total
    emulator.clock.set_speed(3600)
    again = rest("POST", "/v2/pods", pod_body())
    until(lambda: emulator.billed(again["id"]) > 0.3)  # more than half an hour's price within a second


def test_without_money_pods_end(emulator: Emulator) -> None:
    volume = rest("POST", "/v2/network-volumes", {"name": "v", "size": 10, "dataCenter": "EU-RO-1"})
    kept = rest("POST", "/v2/pods", pod_body(mounts={"network": [{"volumeId": volume["id"], "path": "/workspace"}]}))
    rest("POST", "/v2/pods", pod_body())
    until(lambda: all(pod.segments for pod in emulator.pods().values()))
    emulator.world.settings.balance_usd = 0.5
    emulator.clock.advance(3600)
    until(lambda: list(emulator.pods()) == [kept["id"]] and emulator.pods()[kept["id"]].status == "EXITED")
    with pytest.raises(runpod.error.QueryError, match="balance") as caught:
        rest("POST", "/v2/pods", pod_body())
    assert caught.value.status_code == 402


@isolated
def test_folders_that_are_shown_may_be_written(tmp_path: Path, key_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown := tmp_path / "shown").mkdir()
    with Emulator(tmp_path / "emulator", visible=[shown]) as emulator:
        for name, value in emulator.env.items():
            monkeypatch.setenv(name, value)
        pod = rest("POST", "/v2/pods", pod_body(key_pair))
        assert ssh(pod["id"], key_pair, f"touch {shown}/by-the-pod; ls {tmp_path}").stdout == "shown\n"
    assert (shown / "by-the-pod").exists()


def alive_of(pod_id: str) -> list[int]:
    """Processes of this machine that have the pod's id in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"RUNPOD_POD_ID={pod_id}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_terminate_kills_what_was_started_by_ssh(emulator: Emulator, key_pair: Path) -> None:
    pod = rest("POST", "/v2/pods", pod_body(key_pair))
    ssh(pod["id"], key_pair, f"RUNPOD_POD_ID={pod['id']} setsid sleep 300 >/dev/null 2>&1 </dev/null &")
    until(lambda: len(alive_of(pod["id"])) >= 2)  # it, and the container's main process
    runpod.terminate_pod(pod["id"])
    assert alive_of(pod["id"]) == []


def test_pods_end_with_the_emulator_even_if_it_is_killed(tmp_path: Path, key_pair: Path) -> None:
    command = [sys.executable, "-m", "runner", "emulate", "--root", str(tmp_path / "root"), "--key", "k"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split("=")[1].strip()
        assert process.stdout.readline() == "export RUNPOD_API_KEY=k\n"
        os.environ["RUNPOD_API_BASE_URL"] = url
        pod = rest("POST", "/v2/pods", pod_body(key_pair), key="k")
        until(lambda: rest("GET", f"/v2/pods/{pod['id']}", key="k")["ssh"]["direct"])
        until(lambda: alive_of(pod["id"]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: alive_of(pod["id"]) == [], seconds=10)
    finally:
        os.environ.pop("RUNPOD_API_BASE_URL", None)
        process.kill()
        process.wait()


def left_below(root: Path) -> list[str]:
    """Command lines of this machine that name the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [text] if str(root).encode() in (text := file.read_bytes()) else []
        except OSError:
            continue
    return [text.decode().replace("\0", " ") for text in found]


@pytest.mark.parametrize("plain", [False, True], ids=["namespaces", "processes"])
def test_a_pod_that_ends_while_it_begins_leaves_nothing(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.setattr("runner.emulator.container.namespaces", lambda: False)
    emulator.world.settings.provision_s = emulator.world.settings.pull_s = 0.0
    for delay in range(0, 120, 8):
        pod = rest("POST", "/v2/pods", pod_body(args="sleep 300"))
        until(lambda pod=pod: emulator.pods()[pod["id"]].status == "RUNNING")
        time.sleep(delay / 1000)
        runpod.terminate_pod(pod["id"])
    assert left_below(emulator.world.root) == []


def test_without_namespaces_a_pod_is_still_a_pod(
    emulator: Emulator, key_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.emulator.container.namespaces", lambda: False)
    pod = rest("POST", "/v2/pods", pod_body(key_pair, **DISK))
    folder = emulator.pods()[pod["id"]].folder
    script = f". {folder}/disk/etc/rp_environment; echo kept > $RUNNER_WORKSPACE/file; echo $RUNNER_WORKSPACE"
    assert words_of(pod, key_pair, script) == [str(folder / "volume")]
    assert (folder / "volume" / "file").read_text("utf-8") == "kept\n"
    ssh(pod["id"], key_pair, f"RUNPOD_POD_ID={pod['id']} setsid sleep 300 >/dev/null 2>&1 </dev/null &")
    until(lambda: len(alive_of(pod["id"])) >= 2)
    runpod.stop_pod(pod["id"])
    assert alive_of(pod["id"]) == [] and (folder / "volume" / "file").exists() and not (folder / "disk").exists()


def test_the_command_ends_well_when_it_is_told_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runner", "emulate", "--s3", "--realistic", "--fault", "bad_host:pod=x"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path), "COLUMNS": "20"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(6)]
    assert lines.pop().startswith("# a RunPod on this machine, until Ctrl-C; faults: POST http://127.0.0.1:")
    names = [line.partition("=")[0] for line in lines]
    keys = ["AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    assert names == [f"export {name}" for name in ("RUNPOD_API_BASE_URL", "RUNPOD_API_KEY", *keys)]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "billed 0.0000 US$" in out
    assert list(tmp_path.iterdir()) == []


def test_close_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Emulator(tmp_path) as emulator:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", emulator.url)
        pods = [rest("POST", "/v2/pods", pod_body(name=str(n)), key=emulator.key)["id"] for n in range(3)]
        until(lambda: all(alive_of(pod) for pod in pods))
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert [alive_of(pod) for pod in pods] == [[], [], []]
