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

from runner.cloud import clock
from runner.cloud import ledger as ledgers
from runner.cloud.ledger import MIGRATE, NOBODY, Entry, HeldError, Ledger, LedgerError, State, owner

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
    for pod_id, pod in ((None, "runner-a-1"), ("xyz", "xyz")):
        ledger.set("runner-a-1", pod_id=pod_id)
        with pytest.raises(HeldError) as error:
            ledger.plan("runner-a-3", run_id="a", **FACTS)
        (problem,) = error.value.problems
        assert problem.what == f"a is running in pod {pod}: process {os.getppid()} follows it"
        assert problem.remedy == "python -m runner logs a -f looks on"
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


def test_a_pod_that_is_taken_from_a_person_is_the_runs_from_that_moment(ledger: Ledger, at: list[float]) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.move("runner-a-1", "RUNNING", "a person's own", **NOBODY)
    at[0] = 5000.0
    to = {"run_id": "b", "run_dir": "/tmp/runs/b", "heartbeat_s": None}
    entry = ledger.hand_over("runner-a-1", "runner-b-1", running=True, **to)  # type: ignore[arg-type]  # of several types
    assert entry is not None and (entry.created, entry.updated, entry.heartbeat_s) == (5000.0, 5000.0, None)
    before = entry_of(ledger)
    assert (before.ended, before.updated, before.detail) == (5000.0, 5000.0, "handed on to run b")
    assert ledger.transitions("runner-a-1")[-1] == ("RUNNING", "GONE", "handed on to run b")


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


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The present time."""
    present = [1000.0]
    monkeypatch.setattr(clock, "now", lambda: present[0])
    return present


def entry_of(ledger: Ledger, name: str = "runner-a-1") -> Entry:
    found = ledger.entry(name)
    assert found is not None
    return found


def test_what_is_planned_is_all_there(ledger: Ledger, at: list[float]) -> None:
    ledger.plan("runner-a-1", run_id="a", **{**FACTS, "keep": True, "volume": "v1"})
    own: Any = owner()
    assert entry_of(ledger) == Entry(
        "runner-a-1", "a", "/tmp/runs/a", "PLANNED", None, "NVIDIA L4", "secure", 0.49, 30.0, None, 1800.0, 1000.0,
        1000.0, None, "planned", True, "v1", "https://api.runpod.io", "abc", *own.values(),
    )  # fmt: skip
    assert ledger.transitions("runner-a-1") == [(None, "PLANNED", "planned")] and ledger.transitions("runner-b-1") == []
    assert own["pid"] == os.getpid() and owner(os.getppid())["pid"] == os.getppid()


def test_a_move_and_a_fact_have_their_time_and_an_end_its_own(ledger: Ledger, at: list[float]) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    at[0] = 2000.0
    ledger.move("runner-a-1", "CREATING", "asking")
    entry = entry_of(ledger)
    assert (entry.created, entry.updated, entry.detail, entry.ended) == (1000.0, 2000.0, "asking", None)
    ledger.set("runner-a-1", deadline=7.0, keep=True)
    at[0] = 3000.0
    ledger.set("runner-a-1", usd_per_hour=9.0)
    entry = entry_of(ledger)
    assert (entry.updated, entry.deadline, entry.usd_per_hour, entry.keep) == (3000.0, 7.0, 9.0, True)
    ledger.set("runner-a-1", updated=5.0)
    assert entry_of(ledger).updated == 5.0 and entry_of(ledger).detail == "asking"
    at[0] = 4000.0
    ledger.move("runner-a-1", "GONE", "confirmed")
    entry = entry_of(ledger)
    assert (entry.ended, entry.pid, entry.host, entry.pid_started) == (4000.0, None, None, None)
    ledger.move("runner-a-1", "GONE", "again", ended=8.0)
    assert entry_of(ledger).ended == 8.0


def test_entries_are_in_order_and_those_of_one_run_alone(ledger: Ledger, at: list[float]) -> None:
    for number, run_id in enumerate(("b", "a", "a")):
        at[0] = 1000.0 - number
        ledger.plan(f"runner-{run_id}-{number}", run_id=run_id, **FACTS)
    ledger.move("runner-a-2", "GONE", "confirmed")
    assert [e.name for e in ledger.entries()] == ["runner-a-1", "runner-b-0"]
    assert [e.name for e in ledger.entries("a")] == ["runner-a-1"]
    assert [e.name for e in ledger.entries("a", gone=True)] == ["runner-a-2", "runner-a-1"]
    assert ledger.entries("c") == [] and ledger.entry("runner-c-1") is None


def test_who_takes_a_pod_holds_it_and_who_leaves_it_does_not(ledger: Ledger, at: list[float]) -> None:
    assert not ledger.take("runner-a-1")  # there is none
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    assert ledger.take("runner-a-1")  # its own
    ledger.set("runner-a-1", **owner(os.getppid()))
    entry = entry_of(ledger)
    assert entry.owned and not entry.owned_here and not ledger.take("runner-a-1")
    ledger.leave("runner-a-1")
    assert not entry_of(ledger).owned and ledger.take("runner-a-1") and entry_of(ledger).owned_here


@pytest.mark.parametrize("state", get_args(State))
def test_a_launcher_that_leaves_was_heard_of_where_its_pod_ends_itself(
    ledger: Ledger, at: list[float], state: State
) -> None:
    for heard, told, expected in ((True, 500.0, 2000.0), (False, 500.0, 500.0), (True, 9000.0, 9000.0)):
        name = f"runner-{heard}-{told}"
        ledger.plan(name, run_id=name, **FACTS)
        ledger.move(name, state, "", updated=told)
        at[0] = 2000.0
        ledger.leave(name, heard=heard)
        entry = entry_of(ledger, name)
        assert entry.pid is None and entry.updated == (expected if state in ("RUNNING", "COLLECTING") else told)


def test_what_fails_half_way_is_not_done(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    with monkeypatch.context() as context:
        context.setattr(Ledger, "_log", staticmethod(broken))
        with pytest.raises(LedgerError, match="cannot be written: disk I/O error"):
            ledger.move("runner-a-1", "CREATING", "asking")
        assert not ledger.try_move("runner-a-1", "CREATING", "asking")
    assert entry_of(ledger).state == "PLANNED" and len(ledger.transitions("runner-a-1")) == 1
    assert ledger.try_move("runner-a-1", "CREATING", "asking", pod_id="xyz") and entry_of(ledger).pod_id == "xyz"
    with monkeypatch.context() as context:
        context.setattr(Ledger, "_set", staticmethod(broken))
        ledger.leave("runner-a-1")  # whose process will be gone, and be found to be


def broken(*_: object) -> None:
    raise sqlite3.OperationalError("disk I/O error")


def test_a_ledger_that_is_locked_is_waited_for_half_a_minute(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledgers.BUSY_S == 30
    monkeypatch.setattr(ledgers, "BUSY_S", 0.3)
    with closing(sqlite3.connect(ledger.file, isolation_level=None)) as other:
        other.execute("begin immediate")
        began = time.monotonic()
        with pytest.raises(LedgerError, match="database is locked") as error:
            ledger.plan("runner-a-1", run_id="a", **FACTS)
        assert 0.25 < time.monotonic() - began < 3
    assert error.value.problems[0].remedy == "another process of yours holds it: end that, or try again"


def test_the_ledger_is_its_users_alone_and_lies_in_the_folder_of_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path / "a" / "state"))
    assert Ledger().file == tmp_path / "a" / "state" / "ledger.db"
    assert (tmp_path / "a" / "state").stat().st_mode & 0o777 == 0o700
    copy, error = Ledger.or_copy()
    assert error is None and copy.file == Ledger().file


@pytest.mark.parametrize(
    ("damage", "said", "remedy"),
    [
        ("garbage", "file is not a database", "mv {0} {0}.broken; python -m runner pods then lists what there is"),
        ("page", "malformed", "mv {0} {0}.broken; python -m runner pods then lists what there is"),
        ("pipe", "it is no plain file", "mv {0} {0}.broken; python -m runner pods then lists what there is"),
        ("file", "File exists", "make room there, or set RUNNER_STATE=FOLDER to one that can be written to"),
    ],
)
def test_a_ledger_that_cannot_be_used_is_told_with_what_to_do(
    tmp_path: Path, damage: str, said: str, remedy: str
) -> None:
    file = tmp_path / "folder" / "ledger.db"
    if damage == "file":
        file.parent.write_text("")
    else:
        ledger = Ledger(file)
        ledger.plan("runner-a-1", run_id="a", **FACTS)
        with closing(sqlite3.connect(file)) as db:
            db.execute("pragma wal_checkpoint(truncate)")
        content = file.read_bytes()
        if damage == "pipe":
            file.unlink()
            os.mkfifo(file)
        else:
            file.write_bytes(b"x" * 4096 if damage == "garbage" else content[:4096] + bytes(len(content) - 4096))
    with pytest.raises(LedgerError) as error:
        Ledger(file)
    (problem,) = error.value.problems
    assert problem.what.startswith(f"the ledger {file} cannot be written: ") and said in problem.what
    assert "Errno" not in problem.what
    assert problem.remedy == remedy.format(file)
    copy, told = Ledger.or_copy(file)
    assert told is not None and told.problems[0].remedy == problem.remedy and copy.file == file
    assert copy.entries() == []


def test_of_a_ledger_that_cannot_be_written_there_is_a_copy_that_can(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    ledger.move("runner-a-1", "RUNNING", "training", pod_id="xyz")
    ledger.plan("runner-b-1", run_id="b", **FACTS)
    monkeypatch.chdir(ledger.file.parent)
    monkeypatch.setenv("RUNNER_STATE", str(ledger.file.parent))
    with monkeypatch.context() as context:
        context.setattr(ledgers, "_know_all_states", broken)
        copy, error = Ledger.or_copy(ledger.file)
        other, _ = Ledger.or_copy()
    assert error is not None and "disk I/O error" in str(error) and copy.entries() == ledger.entries()
    copy.move("runner-a-1", "TERMINATING", "enough")
    assert entry_of(copy).state == "TERMINATING"  # also from another connection
    assert entry_of(ledger).state == entry_of(other).state == "RUNNING"
    assert other.file == ledger.file
    assert {file.name.partition("-")[0] for file in ledger.file.parent.iterdir()} == {"ledger.db"}  # it is in memory


def test_a_ledger_in_a_folder_that_takes_no_file_is_read(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    with closing(sqlite3.connect(ledger.file)) as db:
        db.execute("pragma wal_checkpoint(truncate)")
    real, asked = sqlite3.connect, list[str]()

    def connect(address: str, **options: Any) -> sqlite3.Connection:
        asked.append(address.partition("?")[2])
        if "immutable" not in address:
            raise sqlite3.OperationalError("unable to open database file")
        return real(address, **options)

    monkeypatch.setattr(ledgers.sqlite3, "connect", connect)
    (row,) = ledgers._readable(ledger.file)
    assert row["name"] == "runner-a-1" and asked == ["mode=ro", "mode=ro&immutable=1"]
    assert ledgers._readable(ledger.file.with_name("none.db")) == []
    odd = ledger.file.with_name("a b?c#d%20.db")
    odd.write_bytes(ledger.file.read_bytes())
    assert len(ledgers._readable(odd)) == 1
