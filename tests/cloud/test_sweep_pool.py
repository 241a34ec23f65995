"""Sweeps over rented pods: real sshd, rsync and trainings in an emulated RunPod; few pods, and none that is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.ledger import Entry, Ledger
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, all_runs, is_alive
from tests.cloud.test_runpod_run import GPU, Typed, adapter_loads, ended, workers
from tests.conftest import ROOT
from tests.support.emulated import Emulator, needs_sshd
from tests.support.front import runner
from tests.support.processes import losses, until, words

RATES = "train.learning_rate=1e-3,2e-3,3e-3"
LONG = ("train.max_steps=100000", "train.save_every_steps=4", "train.keep_checkpoints=2")


class Sweep(Typed):
    """A sweep that a user types, in a process group of its own."""

    def sweep(self, *more: str) -> subprocess.Popen[str]:
        own = words(self.model, self.root / "runs", "where=runpod", "hw.num_cpus=1", *more)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **self.env}
        return subprocess.Popen(
            [sys.executable, "-m", "runner", "-m", *own, "--yes"], env=env, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    @property
    def runs(self) -> list[RunDir]:
        return all_runs(self.root / "runs")

    def entries(self) -> list[Entry]:
        return Ledger(self.root / "state" / "ledger.db").entries(gone=True)

    def rented(self) -> int:
        """Pods that were ever made."""
        return sum(e.method == "POST" and e.path == "/v2/pods" and e.status == 201 for e in self.emulator.exchanges)

    def rows(self) -> list[dict[str, Any]]:
        (file,) = (self.root / "runs" / "sweeps").glob("*/sweep.json")
        rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["runs"]
        return rows

    def cost(self, run: RunDir) -> float:
        return float(run.read("summary.json")["cost"]["usd"])


@pytest.fixture
def typed(tmp_path: Path, model: Path, emulator: Emulator) -> Sweep:
    return Sweep(tmp_path, model, emulator)


def at(typed: Sweep, state: str, count: int = 1) -> Callable[[], bool]:
    """So many pods of the ledger are in that state."""
    return lambda: sum(entry.state == state for entry in typed.entries()) >= count


@pytest.mark.slow
@needs_sshd
def test_a_sweep_has_one_pod_that_goes_from_run_to_run(typed: Sweep) -> None:
    said = ended(typed.sweep(RATES))
    assert typed.rented() == 1 and typed.emulator.pods() == {}
    assert [row["exit_code"] for row in typed.rows()] == [0, 0, 0] and len(typed.runs) == 3
    for run in typed.runs:
        assert run.state() == "done" and len(losses(run.path)) == 12
        adapter_loads(typed.model, run.path / "model")
    assert said.count("over from run") == 2 and said.count("waits for the next run") == 2
    first, *_, last = typed.entries()
    assert {entry.pod_id for entry in typed.entries()} == {first.pod_id} and first.ended is not None
    assert {entry.state for entry in typed.entries()} == {"GONE"}
    for before, after in zip(typed.entries(), typed.entries()[1:], strict=False):
        assert after.created == before.ended  # no second is counted twice, or not at all
    billed, costs = typed.emulator.billed(), [typed.cost(run) for run in typed.runs]
    assert all(costs) and sum(costs) == pytest.approx(billed, rel=0.15)
    (body,) = (e.body for e in typed.emulator.exchanges if e.method == "POST" and e.path == "/v2/pods")
    hours = sum(run.read("spec.json")["where"]["deadline_hours"] for run in typed.runs)
    assert float(body["env"]["RUNNER_DEADLINE"]) > first.created + 3600 * hours  # for who looks at it from elsewhere
    assert last.run_id == typed.runs[-1].id
    assert not (typed.root / "state" / "keys" / first.run_id).exists()


@pytest.mark.slow
@needs_sshd
def test_two_pods_are_two_runs_at_once(typed: Sweep) -> None:
    process = typed.sweep("train.learning_rate=1e-3,2e-3,3e-3,4e-3", "sweep.max_pods=2")
    until(at(typed, "RUNNING", 2), 200)
    said = ended(process)
    assert typed.rented() == 2 and typed.emulator.pods() == {}
    assert len(typed.runs) == 4 and all((run.path / "model").is_dir() for run in typed.runs)
    assert all(f"[{number}] " in said for number in (1, 2, 3, 4))
    assert said.count("over from run") == 2
    costs = [typed.cost(run) for run in typed.runs]
    assert all(costs) and sum(costs) == pytest.approx(typed.emulator.billed(), rel=0.15)


@pytest.mark.slow
@needs_sshd
def test_after_a_run_that_fails_the_next_one_has_another_pod(typed: Sweep) -> None:
    process = typed.sweep("train.max_steps=60,12,13")
    until(lambda: typed.runs and len(list(typed.runs[0].metrics())) > 2, 240)
    for pid in workers(typed.runs[0].id):
        os.kill(pid, signal.SIGKILL)
    ended(process, 1)
    assert sorted(row["exit_code"] for row in typed.rows()) == [0, 0, 1]
    assert typed.rented() == 2 and typed.emulator.pods() == {}
    first, second, _ = typed.entries()
    assert first.pod_id != second.pod_id and first.ended is not None and first.ended < second.created


@pytest.mark.slow
@needs_sshd
def test_a_container_that_restarts_comes_back_with_the_run_that_has_the_pod(typed: Sweep) -> None:
    """Its disk is made anew, and with it who may come in: only the first run, until the agent is there."""
    process = typed.sweep("train.learning_rate=1e-3,2e-3", GPU, "train.max_steps=20", "train.save_every_steps=4")
    until(lambda: len(typed.runs) == 2 and checkpoints.complete(typed.runs[1]), 300)
    (only,) = typed.emulator.pods()
    typed.emulator.inject("restart", pod=only)
    said = ended(process)
    assert "The connection is back" in said
    assert typed.rented() == 1 and typed.emulator.pods() == {}
    first, second = typed.runs
    assert len(losses(second.path)) == 20 and second.read("agent-status.json")["starts"] == 2
    assert len(losses(first.path)) == 20 and first.read("agent-status.json")["starts"] == 1


@pytest.mark.slow
@needs_sshd
@pytest.mark.parametrize("by_hand", [True, False], ids=["reap", "by itself"])
def test_a_launcher_that_is_killed_while_a_pod_is_parked(typed: Sweep, by_hand: bool) -> None:
    process = typed.sweep(RATES, GPU, f"where.heartbeat_minutes={10 if by_hand else 0.2}")
    until(at(typed, "PARKED"), 240)
    process.kill()
    process.communicate()
    (pod,) = typed.emulator.pods().values()
    assert pod.status == "RUNNING"
    if by_hand:
        ended(typed.verb("pods", "reap", "--yes"))
        assert typed.emulator.pods() == {}
    else:
        until(lambda: typed.emulator.pods() == {}, 60)  # not stopped: nothing in it is needed
    assert typed.runs[0].state() == "done" and (typed.runs[0].path / "model").is_dir()


@pytest.mark.slow
@needs_sshd
def test_processes_of_a_sweep_that_is_killed_end_with_it_and_their_pods_are_nobodys(typed: Sweep) -> None:
    process = typed.sweep("train.learning_rate=1e-3,2e-3,3e-3,4e-3", "sweep.max_pods=2", *LONG)
    until(lambda: sum(len(list(run.metrics())) >= 3 for run in typed.runs) == 2, 300)
    owners = {entry.pid for entry in typed.entries()}
    assert len(owners) == 2 and process.pid not in owners
    process.kill()
    process.wait()
    until(lambda: not any(map(is_alive, owners)), 5)
    assert len(typed.emulator.pods()) == 2  # their agents listen for a launcher
    said = ended(typed.verb("pods", "reap", "--all", "--yes", "--json"))
    assert len(json.loads(said.partition("pod ")[0])["ended"]) == 2
    assert typed.emulator.pods() == {} and typed.rented() == 2 and len(typed.runs) == 2


@pytest.mark.slow
@needs_sshd
def test_a_launcher_that_is_killed_in_the_middle_of_a_handover(typed: Sweep) -> None:
    process = typed.sweep(RATES, GPU, "where.heartbeat_minutes=0.2")
    until(lambda: len(typed.entries()) == 2, 240)
    process.kill()
    process.communicate()
    assert typed.entries()[1].state == "SSH_READY"
    until(lambda: typed.emulator.pods() == {}, 60)
    said = ended(typed.verb("pods", "--json"))
    assert json.loads(said.partition("Note")[0]) == []


@pytest.mark.slow
@needs_sshd
@pytest.mark.parametrize("group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_has_every_run_save_and_come_home(typed: Sweep, group: bool) -> None:
    process = typed.sweep("train.learning_rate=1e-3,2e-3,3e-3,4e-3", "sweep.max_pods=2", *LONG)
    until(lambda: sum(len(list(run.metrics())) >= 3 for run in typed.runs) == 2, 300)
    if group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    ended(process, 130)
    assert typed.emulator.pods() == {} and typed.rented() == 2
    assert len(typed.runs) == 2
    for run in typed.runs:
        assert run.state() == "interrupted" and checkpoints.newest(run)
    assert [row["exit_code"] for row in typed.rows()] == [130, 130]


@pytest.mark.slow
@needs_sshd
@pytest.mark.parametrize(("state", "pods"), [("SSH_READY", 2), ("PARKED", 1)])
def test_ctrl_c_before_a_run_has_begun(typed: Sweep, state: str, pods: int) -> None:
    """Two that are being sent, each in a process of its own; and a pod that no run has."""
    process = typed.sweep(RATES, f"sweep.max_pods={pods}")
    until(at(typed, state), 240)
    process.send_signal(signal.SIGINT)
    said = ended(process, 130)
    assert typed.emulator.pods() == {} and "Traceback" not in said
    assert not list((typed.root / "runs" / "sweeps").glob("*/.pool"))


@pytest.mark.slow
@needs_sshd
def test_verbs_take_the_id_of_the_run_that_has_the_pod(typed: Sweep) -> None:
    process = typed.sweep("train.max_steps=12,100000", "train.save_every_steps=50", "train.keep_checkpoints=2")
    until(lambda: len(typed.runs) == 2 and len(list(typed.runs[1].metrics())) > 1, 300)
    first, second = (run.id for run in typed.runs)
    (row,) = json.loads(ended(typed.verb("pods", "--json")))
    assert row["run_id"] == second and row["held"] and second not in row["name"].partition("-2")[0]
    assert json.loads(ended(typed.verb("status", second, "--json")))["agent"] == "training"
    said = ended(typed.verb("pods", "ssh", second, "echo", "inside"))
    assert "inside" in said
    said = ended(typed.verb("fetch", first, "--output-dir", str(typed.root / "runs")), 2)
    assert f"RunPod has no pod of run {first}" in said  # and does not end the other one's
    assert json.loads(ended(typed.verb("pods", "reap", "--all", "--yes", "--json"))) == {"ended": [], "stopped": []}
    assert len(typed.emulator.pods()) == 1
    process.send_signal(signal.SIGINT)
    ended(process, 130)
    assert typed.emulator.pods() == {}


# ── before anything is rented ────────────────────────────────────────────────────────────────────

RENTED = ("-m", "where=runpod", "hw=rtx4090", "model=mistral7b", "method=qlora4", "train.max_steps=10")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("train.seed=1,2", "sweep.max_pods=2", "--detach"), "leave out --detach, or sweep.max_pods=2"),
        (("train.seed=1,2", "hydra/launcher=joblib"), "write sweep.max_pods=2, say, and leave hydra/launcher"),
        (("train.seed=1,2", "sweep.max_pods=0"), "sweep.max_pods"),
    ],
)
def test_what_cannot_be_is_refused(
    more: tuple[str, ...], what: str, here: Path, state: Path, emulator: Emulator
) -> None:
    result = runner(*RENTED, *more, "--yes")
    assert result.exit_code == 2 and what in result.output
    assert emulator.pods() == {}


def test_pods_are_for_rented_runs(here: Path, state: Path, emulator: Emulator) -> None:
    result = runner("-m", "where=local,runpod", "hw=cpu", "train.max_steps=1", "sweep.max_pods=2", "--yes")
    assert result.exit_code == 2 and "1 of 2 runs are not rented" in result.output
    assert emulator.pods() == {} and not (here / "runs").exists()


def test_the_question_names_runs_pods_and_the_sum(
    here: Path, state: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.cloud.executor.check", lambda *_: None)  # nobody can be asked here
    result = runner(*RENTED, "train.seed=1,2,3", "sweep.max_pods=2", "where.max_usd=5")
    assert "Sweep   3 runs, on up to 2 pods, about $" in result.output
    assert "never more than $5 a run" in result.output and "Rent it?" in result.output
    assert emulator.pods() == {}
