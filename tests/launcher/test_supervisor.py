"""Who is ended for want of life, and who is only slow."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.launcher import supervisor
from runner.launcher.explain_failure import report_ending, slowest_rank
from runner.launcher.supervisor import Ending
from runner.rundir.directory import RunDir
from tests.conftest import spec_of

WORKER = """
import json, os, socket, sys, time
def beat(phase):
    sign = {"rank": 0, "pid": os.getpid(), "host": socket.gethostname(), "state": "alive", "phase": phase}
    with open(sys.argv[1] + ".tmp", "w") as file:
        json.dump({**sign, "beat": time.time()}, file)
    os.replace(sys.argv[1] + ".tmp", sys.argv[1])
for phase, seconds in zip(sys.argv[2::2], sys.argv[3::2]):
    beat(phase)
    time.sleep(float(seconds))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "logs").mkdir()
    return RunDir(tmp_path)


def worker(run: RunDir, *phases: str) -> subprocess.Popen[bytes]:
    """A process that gives a sign of life for each phase, and then none for so many seconds."""
    return subprocess.Popen([sys.executable, "-c", WORKER, str(run.path / "logs" / "rank0.json"), *phases])


@pytest.mark.slow
def test_who_writes_a_checkpoint_may_be_silent_for_longer(run: RunDir) -> None:
    ending = supervisor.watch(worker(run, "training", "0.1", "saving", "8", "training", "0.1"), run, 4 / 60)
    assert (ending.code, ending.hung) == (0, None)


def test_who_trains_may_not(run: RunDir) -> None:
    process = worker(run, "training", "60")
    ending = supervisor.watch(process, run, 4 / 60)
    assert ending.hung is not None and ending.hung["phase"] == "training" and process.poll() is not None


def test_a_process_that_never_begins_is_ended(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MEETING_SECONDS", 2.0)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    began = time.monotonic()
    ending = supervisor.watch(process, run, 0.1 / 60)
    assert time.monotonic() - began < 30 and process.poll() is not None
    problem = slowest_rank(run, ending).problems[0]
    assert problem.what.startswith("the worker hangs: no heartbeat for") and "(starting)" in problem.what
    assert problem.remedy is not None and "it never began; see" in problem.remedy


@pytest.mark.parametrize(("last", "code"), [("done", 0), ("alive", 1)])
def test_a_signal_while_python_leaves_after_the_last_word_changes_nothing(last: str, code: int, run: RunDir) -> None:
    spec = spec_of()
    run.write("spec.json", spec.model_dump(mode="json"))
    run.set_status("done" if last == "done" else "training", exit_code=0)
    sign = {"rank": 0, "pid": 1, "host": "here", "state": last, "beat": time.time()}
    ending = Ending(-signal.SIGTERM, [sign])
    assert report_ending(run, spec, ending, lambda: "somebody else") == code
    assert run.read("status.json")["state"] == ("done" if last == "done" else "failed")


def test_null_waits(run: RunDir) -> None:
    ending = supervisor.watch(worker(run, "training", "3"), run, None)
    assert ending.hung is None and ending.code == 0
