"""The ledger: what was meant is on the disk before it is done, and two launchers do not fight over it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest

from runner.cloud.ledger import MIGRATE, NOBODY, HeldError, Ledger, LedgerError, State, owner

FACTS: dict[str, Any] = {
    "run_dir": "/tmp/runs/a", "gpu": "NVIDIA L4", "cloud": "secure", "usd_per_hour": 0.49, "disk_gb": 30.0,
    "keep": False, "volume": None, "base": "https://api.runpod.io", "account": "abc", "heartbeat_s": 1800.0,
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def test_states_and_reasons_are_kept_in_order(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.move("runner-a-1", "CREATING", "asking")
    ledger.move("runner-a-1", "PROVISIONING", "created", pod_id="xyz", usd_per_hour=0.6)
    entry = Ledger(ledger.file).entry("runner-a-1")
    assert entry is not None and (entry.state, entry.pod_id, entry.usd_per_hour) == ("PROVISIONING", "xyz", 0.6)
    assert entry.owned_here
    ledger.move("runner-a-1", "GONE", "confirmed")
    assert ledger.entries() == [] and ledger.entries("a", gone=True)[0].ended is not None
    assert [(old, new) for old, new, _ in ledger.transitions("runner-a-1")] == [
        (None, "PLANNED"), ("PLANNED", "CREATING"), ("CREATING", "PROVISIONING"), ("PROVISIONING", "GONE"),
    ]  # fmt: skip


def test_a_name_is_planned_once_and_an_unknown_state_is_refused(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    with pytest.raises(LedgerError):
        ledger.plan("runner-a-1", run_id="a", **FACTS)
    with pytest.raises(LedgerError):
        ledger.move("runner-a-1", "LOST", "no such state")
    with pytest.raises(LedgerError):
        ledger.move("runner-b-1", "GONE", "never planned")
    entry = ledger.entry("runner-a-1")
    assert entry is not None and entry.state == "PLANNED"


def test_a_killed_process_holds_nothing_and_what_it_wrote_is_there(ledger: Ledger) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from runner.cloud.ledger import Ledger\n"
        "from tests.cloud.test_ledger import FACTS\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.plan('runner-a-1', run_id='a', **FACTS)\n"
        "ledger.move('runner-a-1', 'CREATING', 'asking'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ledger.file)], check=False)
    assert done.returncode == -9
    entry = ledger.entry("runner-a-1")
    assert entry is not None and entry.state == "CREATING" and not entry.owned
    assert ledger.take("runner-a-1")
    entry = ledger.entry("runner-a-1")
    assert entry is not None and entry.pid == os.getpid()


def test_what_a_living_process_holds_is_not_taken(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    code = "import sys; from pathlib import Path; from runner.cloud.ledger import Ledger\n"
    code += "print(Ledger(Path(sys.argv[1])).take('runner-a-1'))"
    run = [sys.executable, "-c", code, str(ledger.file)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "False"
    ledger.leave("runner-a-1")
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_a_process_number_that_is_used_again_is_not_the_owner(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.set("runner-a-1", pid_started=1.0)
    entry = ledger.entry("runner-a-1")
    assert entry is not None and not entry.owned


def test_many_writers_at_once(ledger: Ledger) -> None:
    def write(number: int) -> None:
        ledger.plan(f"runner-a-{number}", run_id="a", **FACTS)
        for _ in range(5):
            ledger.move(f"runner-a-{number}", "CREATING", "asking")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(16)))
    assert len(ledger.entries("a")) == 16


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be written") as error:
        Ledger(tmp_path / "file" / "ledger.db")
    assert "RUNNER_STATE" in str(error.value.problems[0].remedy)


def test_an_intent_is_on_the_disk_before_the_request_leaves(ledger: Ledger) -> None:
    with ledger._open() as db:
        assert db.execute("pragma synchronous").fetchone()[0] == 2  # FULL: an fsync for every transaction
        assert db.execute("pragma journal_mode").fetchone()[0] == "wal"


def test_a_parked_pod_goes_to_one_other_run_and_no_second_is_lost(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.move("runner-a-1", "SSH_READY", "ready", pod_id="xyz")
    to = {"run_dir": "/tmp/runs/b", "heartbeat_s": 60.0}
    assert ledger.hand_over("runner-a-1", "runner-b-1", run_id="b", **to) is None  # it is not parked
    ledger.move("runner-a-1", "PARKED", "waits", **owner(os.getppid()))
    parked = ledger.entry("runner-a-1")
    assert parked is not None and parked.owned and not parked.owned_here and not ledger.take("runner-a-1")
    entry = ledger.hand_over("runner-a-1", "runner-b-1", run_id="b", **to)
    assert entry is not None and ledger.hand_over("runner-a-1", "runner-c-1", run_id="c", **to) is None
    assert (entry.state, entry.pod_id, entry.run_id, entry.run_dir) == ("SSH_READY", "xyz", "b", "/tmp/runs/b")
    assert entry.owned_here and entry.usd_per_hour == 0.49 and entry.heartbeat_s == 60.0
    (before,) = ledger.entries("a", gone=True)
    assert before.state == "GONE" and before.ended == parked.updated == entry.created and not before.owned
    assert [e.name for e in ledger.entries()] == ["runner-b-1"]
    assert ledger.transitions("runner-b-1") == [(None, "SSH_READY", "taken over from run a")]


def test_two_launchers_do_not_rent_for_one_run(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.plan("runner-a-2", run_id="a", **FACTS)  # the same process, after a pod that did not become ready
    ledger.set("runner-a-1", **owner(os.getppid()))
    with pytest.raises(HeldError, match=f"process {os.getppid()} looks after it"):
        ledger.plan("runner-a-3", run_id="a", **FACTS)
    ledger.plan("runner-b-1", run_id="b", **FACTS)
    ledger.move("runner-a-1", "GONE", "confirmed", **owner(os.getppid()))
    ledger.plan("runner-a-3", run_id="a", **FACTS)


@pytest.mark.parametrize("state", get_args(State))
def test_what_may_be_handed_over(ledger: Ledger, state: State) -> None:
    """A pod at work only as a person's own, and one that another process holds only if it is parked for whoever comes
    first."""
    to = {"run_id": "b", "run_dir": "/tmp/runs/b", "heartbeat_s": None}
    for number, (theirs, running) in enumerate(((True, True), (True, False), (False, False), (False, True))):
        old, new = f"runner-a-{number}", f"runner-b-{number}"
        ledger.plan(old, run_id=f"a{number}", **FACTS)
        ledger.move(old, state, "", **(owner(os.getppid()) if theirs else NOBODY))
        may = state == "PARKED" or (not theirs and (state == "STOPPED" or (state == "RUNNING" and running)))
        entry = ledger.hand_over(old, new, running=running, **to)
        assert (entry is not None) is may, (theirs, running)


def test_a_stopped_pod_is_paid_for_again_from_the_moment_it_is_taken(ledger: Ledger) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.move("runner-a-1", "STOPPED", "kept", updated=1000.0, created=500.0, **NOBODY)
    entry = ledger.hand_over("runner-a-1", "runner-b-1", run_id="b", run_dir="/tmp/runs/b", heartbeat_s=None)
    assert entry is not None and abs(entry.created - time.time()) < 60
    (before,) = ledger.entries("a", gone=True)
    assert before.ended == 1000.0  # when it was stopped


def test_a_ledger_of_an_earlier_version_learns_new_states(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as db:
        db.executescript(MIGRATE.replace("'PARKED', ", ""))
    assert "PARKED" not in MIGRATE.replace("'PARKED', ", "")
    with closing(sqlite3.connect(file)) as db, db:
        facts = {**FACTS, "name": "runner-a-1", "run_id": "a", "state": "RUNNING", "created": 1.0, "updated": 1.0,
                 "detail": "", "keep": 0, "deadline": None}  # fmt: skip
        db.execute(f"insert into pods ({', '.join(facts)}) values ({', '.join('?' * len(facts))})", [*facts.values()])
    with ThreadPoolExecutor(4) as pool:
        ledgers = list(pool.map(lambda _: Ledger(file), range(4)))
    ledgers[0].move("runner-a-1", "PARKED", "waits")
    (entry,) = ledgers[1].entries("a")
    assert entry.state == "PARKED" and entry.gpu == FACTS["gpu"] and entry.created == 1.0
    with pytest.raises(LedgerError):
        ledgers[2].move("runner-a-1", "LOST", "no such state")
