"""Hostfiles, and what can be wrong with several machines before and while they meet: told at once, with its remedy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import __version__
from runner.errors import CannotRunError
from runner.launcher import nodes
from runner.machine import hostfile
from runner.rundir.directory import RunDir, all_runs
from tests.conftest import ROOT, run_cli
from tests.support import front
from tests.support.front import only_problem, problems_of, spec_of, write

here = front.here
laptop = front.laptop

TWO = "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"
"""This machine, twice: nothing answers on the second address."""


# --- the file ---------------------------------------------------------------------------------------


def test_comments_and_blank_lines_and_users(here: Path) -> None:
    write(here / "hosts", "# the lab\n\nworker-1   slots=2\nme@worker-2\tslots=2 # new\n")
    hw = spec_of("hw=cpu", "hw.hostfile=hosts").hw
    assert (hw.num_nodes, hw.processes_per_node, hw.world_size, hw.rendezvous) == (2, 2, 4, "worker-1:29500")


def test_every_line_that_is_wrong_is_told_with_its_number(here: Path) -> None:
    bad = ["b", "c slots=two", "d slots=0", "-oProxyCommand=x slots=2", "a slots=2", "e slots=4"]
    write(here / "hosts", "a slots=2\n# b\n" + "\n".join(bad))
    found = problems_of("hw=cpu", "hw.hostfile=hosts")
    assert [problem.source for problem in found.values()] == [f"hosts:{number}" for number in range(3, 9)]
    assert all(problem.remedy for problem in found.values())
    assert "e has 4 slots, and a has 2" in found


@pytest.mark.parametrize("content", ["", "# nobody\n\n"])
def test_a_file_without_machines(here: Path, content: str) -> None:
    write(here / "hosts", content)
    assert only_problem("hw=cpu", "hw.hostfile=hosts").what == "there is no machine in it"


def test_no_such_file(here: Path) -> None:
    problem = only_problem("hw=cpu", "hw.hostfile=nowhere")
    assert "nowhere cannot be read: No such file" in problem.what and "slots=4" in str(problem.remedy)


def test_what_was_written_beside_it(here: Path) -> None:
    write(here / "hosts", "a slots=8\nb slots=8\nc slots=8\n")
    assert spec_of("hw=h100x8", "hw.hostfile=hosts").hw.num_nodes == 3
    assert spec_of("hw=h100x8", "hw.hostfile=hosts", "hw.num_nodes=2").hw.num_nodes == 2
    assert spec_of("hw=h100x8", "hw.hostfile=hosts", "hw.rendezvous=10.0.0.1:7").hw.rendezvous == "10.0.0.1:7"
    assert spec_of("hw=h100x8", "hw.hostfile=hosts", "hw.num_nodes=1").hw.rendezvous is None
    many = only_problem("hw=h100x8", "hw.hostfile=hosts", "hw.num_nodes=4")
    assert many.what == "hw.num_nodes=4, and hosts has 3 machines"
    other = only_problem("hw=h100x3", "hw.hostfile=hosts")
    assert (other.source, other.remedy) == ("hosts:1", "write hw.num_gpus=8, or slots=3")
    processes = only_problem("hw=cpu", "hw.hostfile=hosts", "hw.num_processes=2")
    assert processes.remedy == "write hw.num_processes=8, or slots=2"


def test_a_resolved_run_keeps_its_machines(here: Path) -> None:
    write(here / "hosts", "a slots=2\nb slots=2\n")
    spec = spec_of("hw=cpu", "hw.hostfile=hosts")
    write(here / "spec.json", spec.model_dump_json())
    write(here / "hosts", "a slots=2\nb slots=2\nc slots=2\n")
    assert spec_of("spec.json").hw == spec.hw
    batch = ("train.micro_batch_size=auto", "train.accumulation_steps=auto")
    assert spec_of("spec.json", "hw.num_nodes=3", *batch).hw.num_nodes == 3


# --- the schema -------------------------------------------------------------------------------------


def test_several_machines_need_a_place_to_meet(here: Path) -> None:
    problem = only_problem("hw=cpu", "hw.num_nodes=2")
    assert problem.what == "hw.num_nodes=2, and the machines have no place to meet"
    assert "hw.rendezvous=HOST:29500" in str(problem.remedy) and "hw.hostfile=FILE" in str(problem.remedy)
    assert spec_of("hw=h100x8", "hw.num_nodes=2", "where=runpod").hw.world_size == 16  # a pod has no address yet


@pytest.mark.parametrize("value", ["worker-1", "worker-1:", "worker-1:0", "worker-1:70000", "a b:1", "'fe80::1:1'"])
def test_a_rendezvous_has_host_and_port(here: Path, value: str) -> None:
    problem = only_problem("hw=cpu", "hw.num_nodes=2", f"hw.rendezvous={value}")
    assert "expected HOST:PORT" in problem.what and ":29500" in str(problem.remedy)


# --- the other machines -----------------------------------------------------------------------------


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """`ssh` is this shell script: `$host`, `$command`."""
    file = write(folder / "bin" / "ssh", f"#!/bin/sh\nfor word; do host=$command; command=$word; done\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


def refusal(*words: str) -> str:
    nodes._check.cache_clear()
    with pytest.raises(CannotRunError) as caught:
        nodes.check_nodes(spec_of("hw=cpu", "hw.hostfile=hosts", *words))
    return "\n".join(f"{p.what} ({p.source}) → {p.remedy}" for p in caught.value.problems)


def test_only_the_first_machine_starts_a_run(here: Path) -> None:
    write(here / "hosts", "192.0.2.1 slots=1\n127.0.0.1 slots=1\n")
    assert "this machine is not 192.0.2.1, the first of hosts (hosts:1)" in refusal()


def test_machines_that_do_not_answer_are_told_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "hosts", TWO + "nobody.invalid slots=1\n")
    stand_in(here, monkeypatch, 'echo "ssh: connect to host $host port 22: Connection refused"; exit 255')
    said = refusal()
    assert "127.0.0.2 cannot be reached by ssh: ssh: connect to host 127.0.0.2 port 22: Connection refused" in said
    assert "(hosts:2)" in said and "(hosts:3)" in said and "ssh -o BatchMode=yes nobody.invalid true" in said


def test_a_machine_without_the_folder_or_with_another_version(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "hosts", TWO)
    stand_in(here, monkeypatch, 'echo "sh: 1: cd: can\'t cd to /work"; exit 2')
    assert "127.0.0.2 cannot start the runner: sh: 1: cd: can't cd to /work" in refusal()
    stand_in(here, monkeypatch, 'echo "python -m runner, version 0.0.1"')
    assert f"another version of the runner: python -m runner, version 0.0.1, and here it is {__version__}" in refusal()


def test_no_ssh(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "hosts", TWO)
    monkeypatch.setenv("PATH", str(here))
    assert "join by hand" in refusal()


def test_the_command_is_quoted_and_holds_no_key(tmp_path: Path, laptop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my project; it's 100% mine"
    write(folder / "hosts", TWO)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/data/hugging face")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stand_in(folder, monkeypatch, f'echo "$@" > "{tmp_path}/words"; sh -c "$command"')
    nodes._check.cache_clear()
    nodes.check_nodes(spec_of("hw=cpu", "hw.hostfile=hosts"))  # the real command, through a shell, from another folder
    words = (tmp_path / "words").read_text("utf-8")
    assert "BatchMode=yes" in words and "HF_HOME=/data/hugging face" in words and "hf_secret" not in words


def test_a_machine_that_drops_out_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hosts", TWO)
    said = 'echo "This cannot run"; echo "  • training needs torch"; echo "    → pip install torch"; exit 3'
    stand_in(tmp_path, monkeypatch, f'case $command in *--version) sh -c "$command";; *) {said};; esac')
    began = time.monotonic()
    runs = f"run.output_dir={tmp_path / 'runs'}"
    meeting = f"hw.rendezvous=127.0.0.1:{free_port()}"
    done = run_cli("hw=cpu", "deepspeed=none", f"hw.hostfile={tmp_path / 'hosts'}", meeting, runs)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "127.0.0.2 ended with exit code 3: training needs torch" in done.stderr, done.stderr
    assert "node1.log" in done.stderr and "Traceback" not in done.stderr
    (run,) = all_runs(tmp_path / "runs")
    assert run.state() == "failed"


# --- join -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def a_run(folder: Path, *words: str, state: str = "created") -> RunDir:
    """The folder of a run that waits for its second machine."""
    own = f"run.output_dir={folder / 'runs'}"
    spec = spec_of("hw=cpu", "hw.num_nodes=2", f"hw.rendezvous=127.0.0.1:{free_port()}", own, *words)
    run = RunDir.create(spec)
    run.set_status(state)
    return run


def test_what_cannot_be_joined(here: Path) -> None:
    nowhere = front.runner("join", "runs/none")
    assert nowhere.exit_code == 2 and "there is no run runs/none on" in nowhere.stderr
    assert "run.output_dir must be one that all machines share" in nowhere.stderr
    over = front.runner("join", str(a_run(here, state="failed").path))
    assert over.exit_code == 2 and "waits for no machine: it is failed" in over.stderr
    assert "python -m runner resume runs/" in over.stderr
    alone = front.runner("join", str(a_run(here, "hw.num_nodes=1").path))
    assert alone.exit_code == 2 and "is a run of one machine" in alone.stderr
    full = a_run(here)
    write(full.path / "logs" / "node1.json", json.dumps({"host": "worker-2", "pid": 1}))
    late = front.runner("join", str(full.path))
    assert late.exit_code == 2 and "all 2 machines are there: the first one and worker-2" in late.stderr


def test_a_machine_that_is_waiting_ends_with_the_first_ones_connection(here: Path) -> None:
    run = a_run(here)
    joiner = subprocess.Popen(
        [sys.executable, "-m", "runner", "join", str(run.path), "--node", "1", "--attached"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    launcher = wait_for_launcher(run, "launcher1.log")
    out, err = joiner.communicate(timeout=60)  # closes its input
    assert joiner.returncode == 130, out + err
    assert "machine 2 of 2" in out and "Traceback" not in err
    assert launcher.exists()
    assert run.read("status.json")["state"] == "created"  # the first machine's business


@pytest.mark.slow
def test_ctrl_c_while_the_first_machine_waits(tmp_path: Path) -> None:
    words = ["hw=cpu", "deepspeed=none", "hw.num_nodes=2", f"hw.rendezvous=127.0.0.1:{free_port()}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *words, f"run.output_dir={tmp_path}"], cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not all_runs(tmp_path):
        time.sleep(0.05)
    (run,) = all_runs(tmp_path)
    wait_for_launcher(run, "launcher.log")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted before there was anything to save" in err and "Traceback" not in err
    assert run.state() == "interrupted"


def wait_for_launcher(run: RunDir, name: str) -> Path:
    """Until torchrun was started."""
    file = run.path / "logs" / name
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(4.0)  # then torch is imported, and it waits in C++, where it is deaf to signals
    return file


# --- addresses --------------------------------------------------------------------------------------


def test_own_addresses() -> None:
    assert hostfile.is_own("127.0.0.1") and hostfile.is_own("localhost")
    assert not hostfile.is_own("192.0.2.1") and not hostfile.is_own("nobody.invalid")


def test_nobody_is_met_on_the_loopback() -> None:
    names = {name for _, name in socket.if_nameindex()} - {"lo"}
    assert hostfile.interface("127.0.0.1:29500") in {*names, None}
    assert hostfile.interface("127.0.0.1:29500", address="127.0.0.1") is None
    assert hostfile.split("[fe80::1]:29500") == ("fe80::1", 29500)
