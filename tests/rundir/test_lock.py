"""A run has one owner: resume never starts a second one, and always goes on where there is none any more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RequestError
from runner.rundir.directory import RunDir, is_alive, process_birth
from runner.rundir.lock import inherited_locks, own_run
from runner.runs.launch import resume
from tests.conftest import run_cli, spec_of
from tests.launcher.test_interrupts import below
from tests.support.processes import losses, only_run, start, until, words

SOMEBODY = "0c9d1b8e-0000-0000-0000-000000000000:1"
"""A process of another boot."""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has not begun, and whose process is this one."""
    return RunDir.create(spec_of(f"run.output_dir={tmp_path}"))


def refusal(run: RunDir) -> str:
    """What resume says, before anything is changed."""
    before = {file: file.read_bytes() for file in run.path.rglob("*.json")}
    with pytest.raises(RequestError) as caught:
        resume(run, (), (), None, False)
    assert {file: file.read_bytes() for file in run.path.rglob("*.json")} == before
    (problem,) = caught.value.problems
    return f"{problem.what} → {problem.remedy}"


@pytest.mark.slow
def test_a_worker_that_its_launcher_lost_keeps_the_run(model: Path, tmp_path: Path) -> None:
    """The launcher gets SIGKILL before there is a sign of life; the worker is stopped, so that it cannot end."""
    front = start(*words(model, tmp_path))
    worker = until(lambda: [p for p in below(front) if "runner.train" in p.cmdline()])[0]
    worker.send_signal(signal.SIGSTOP)
    until(lambda: worker.status() == "stopped")  # else the SIGTERM of the launcher's death comes first
    run = RunDir(until(lambda: only_run(tmp_path)))
    front.kill()
    front.wait()
    shutil.rmtree(run.path / "logs")
    assert run.state() == "killed" and f"process {worker.pid}" in refusal(run)
    worker.kill()
    until(lambda: not is_alive(worker.pid))
    run_cli("resume", str(run.path), code=0, OMP_NUM_THREADS="1")  # without `logs/`
    assert len(losses(run.path)) == 12 and run.state() == "done"


def test_of_two_resumes_at_once_one_is_refused(run: RunDir) -> None:
    run.set_status("interrupted")
    with own_run(run):
        told = run_cli("resume", str(run.path))
        assert told.returncode == 2
        assert f"{run.id} is running (interrupted, process {os.getpid()})" in told.stderr
        assert f"wait for its end, or stop it: kill {os.getpid()}" in told.stderr
    with own_run(run):
        pass


def test_the_lock_lives_as_long_as_who_inherited_it(run: RunDir) -> None:
    run.set_status("interrupted")
    with own_run(run):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=inherited_locks())
    assert "is running" in refusal(run)
    child.communicate(b"\n")
    with own_run(run):
        assert len(inherited_locks()) == 1
    assert inherited_locks() == ()


@pytest.mark.parametrize("file", ["status.json", "logs/rank0.json"])
def test_a_number_that_another_process_has_now_is_nobody(file: str, run: RunDir) -> None:
    """After a reboot, or in a container that was started again: 57 is somebody else."""
    if file == "status.json":
        run.set_status("training", born=SOMEBODY)
    else:
        run.set_status("failed")
        sign = {"rank": 0, "pid": os.getpid(), "host": socket.gethostname(), "state": "alive", "beat": 0.0}
        run.write(file, {**sign, "born": process_birth(os.getpid())})
        assert f"process {os.getpid()}" in refusal(run)
        run.write(file, {**sign, "born": SOMEBODY})
    assert run.state() in ("killed", "failed")
    _is_free(run)


def test_a_run_under_an_earlier_name_of_this_machine_is_not_at_work_for_ever(run: RunDir) -> None:
    run.set_status("training", host="before-dhcp", born=process_birth(os.getpid()))
    assert run.state() == "training"  # started without a lock: nobody can tell
    with own_run(run):
        assert run.state() == "training"
    assert run.state() == "killed"
    run.set_status("training", host="another-machine", born=SOMEBODY)
    assert run.state() == "training"


@pytest.mark.parametrize(
    ("born", "free"),
    [(process_birth(os.getpid()), True), (SOMEBODY, False), (None, False)],
    ids=["this machine", "another", "unknown"],  # not the value: workers of a parallel run have to collect the same
)
def test_another_host_is_believed_unless_it_is_this_machine(born: Any, free: bool, run: RunDir) -> None:
    """A container gets a new name each time, a laptop with each network; another machine cannot be looked at."""
    run.set_status("training", host="elsewhere", pid=57, born=born)
    if free:
        _is_free(run)
        return
    told = refusal(run)
    assert f"{run.id} is running on elsewhere (training, process 57)" in told and "stop it there: kill 57" in told
    assert (
        f"if elsewhere is no more, delete {os.path.relpath(run.path / 'status.json')} and resume again" in told
        or f"delete {run.path / 'status.json'} and resume again" in told
    )
    (run.path / "status.json").unlink()
    _is_free(run)


def _is_free(run: RunDir) -> None:
    """Resume gets as far as composing: it would start."""
    run.write("spec.json", {**run.read("spec.json"), "model": {"id": "x"}, "nonsense": 1})
    assert "nonsense" in refusal(run)


def test_a_file_that_is_no_spec_is_told_in_words(run: RunDir) -> None:
    run.set_status("interrupted")
    run.spec_file.write_text(json.dumps({"a": 1})[:-1], "utf-8")
    assert "spec.json" in refusal(run)
