"""No pod is left without a word because of its ledger: deleted, full, locked, garbage. It is ended first, and then
recorded; where neither is certain, its id and the command that ends it are said."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runner.cloud import ledger as ledgers
from runner.cloud.lease import Lease
from runner.cloud.ledger import Ledger, LedgerError
from runner.cloud.provider_errors import StillThereError
from runner.cloud.reconcile import reconcile
from runner.cloud.rent_pod import acquire
from runner.cloud.runpod.runpod_provider import RunPod
from runner.emulator.container import namespaces
from tests.conftest import ROOT
from tests.support.emulated import Emulator
from tests.support.front import runner
from tests.support.rented import KEY, PLAN, impatient, rented_spec, run_of

pytestmark = pytest.mark.usefixtures("state", "here", "hello", "quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for as long as it would be."""
    monkeypatch.setattr(ledgers, "BUSY_S", 0.2)
    impatient(monkeypatch, 1.0)


def rent(tmp_path: Path, say: Callable[[str], None] = print) -> Lease:
    spec = rented_spec("where.setup_minutes=0.2", "where.volume_gb=20")
    return acquire(run_of(spec, tmp_path / "runs"), spec, PLAN, KEY, say)


DAMAGES = ["deleted", "garbage", "zeroed page", "a folder", "a pipe", "locked", "cannot be written"]


@pytest.fixture
def damage(state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Do it to the ledger."""
    holder: list[sqlite3.Connection] = []

    def do(kind: str) -> None:
        file = state / "ledger.db"
        with closing(sqlite3.connect(file)) as db:
            db.execute("pragma wal_checkpoint(truncate)")
        size = file.stat().st_size
        if kind == "locked":
            holder.append(sqlite3.connect(file, isolation_level=None))
            holder[0].execute("begin immediate")
        elif kind == "cannot be written":  # as on a disk that is full, or read-only
            for name in ("_set", "_insert"):
                monkeypatch.setattr(Ledger, name, staticmethod(_full(getattr(Ledger, name))))
        elif kind == "zeroed page":
            content = bytearray(file.read_bytes())
            content[4096:8192] = bytes(4096)
            file.write_bytes(content)
        elif kind == "garbage":
            file.write_bytes(os.urandom(size))
        else:
            for part in state.glob("ledger.db*"):
                part.unlink()
            if kind == "a folder":
                file.mkdir()
            elif kind == "a pipe":
                os.mkfifo(file)

    yield do
    for db in holder:
        db.close()


def _full(write: Callable[..., None]) -> Callable[..., None]:
    def written(db: sqlite3.Connection, *values: object) -> None:
        if db.execute("pragma database_list").fetchone()["file"]:
            raise sqlite3.OperationalError("database or disk is full")
        write(db, *values)  # in memory there is room

    return written


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_that_ends_gives_its_pod_back(
    emulator: Emulator, tmp_path: Path, kind: str, damage: Callable[[str], None]
) -> None:
    rented = rent(tmp_path)
    damage(kind)
    assert rented.refresh() is not None
    rented.release()
    assert emulator.pods() == {}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_goes_on_and_says_how_to_end_its_pod(
    emulator: Emulator, tmp_path: Path, kind: str, damage: Callable[[str], None]
) -> None:
    said: list[str] = []
    rented = rent(tmp_path, said.append)
    damage(kind)
    rented.mark("RUNNING", "training")
    words = "\n".join(said)
    assert "MAY STILL BE RUNNING" in words and f"python -m runner pods terminate {rented.pod.id}" in words


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("by", ["pod", "run"])
def test_terminate_needs_no_ledger(
    emulator: Emulator, tmp_path: Path, kind: str, by: str, damage: Callable[[str], None]
) -> None:
    rented = rent(tmp_path)
    rented.mark("RUNNING", "training")
    damage(kind)
    result = runner("pods", "terminate", rented.pod.id if by == "pod" else rented.run_id)
    assert result.exit_code == 0 and "is gone" in result.output, result.output
    assert emulator.pods() == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_the_list_and_reap_need_no_ledger(
    emulator: Emulator, tmp_path: Path, kind: str, damage: Callable[[str], None]
) -> None:
    rented = rent(tmp_path)
    rented.mark("RUNNING", "training")
    rented.ledger.leave(rented.name)
    damage(kind)
    result = runner("pods", "--json")
    assert result.exit_code == 0 and rented.pod.id in result.output, result.output
    result = runner("pods", "reap", "--all", "--yes")
    assert result.exit_code == 0 and emulator.pods() == {}, result.output


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "deleted"])  # which is made anew
def test_without_a_ledger_nothing_is_rented(
    emulator: Emulator, tmp_path: Path, kind: str, damage: Callable[[str], None]
) -> None:
    Ledger()
    damage(kind)
    with pytest.raises(LedgerError, match=r"ledger.db cannot be written") as error:
        rent(tmp_path)
    assert emulator.pods() == {} and error.value.problems[0].remedy


def test_what_is_told_about_a_damaged_ledger_works_when_it_is_typed(
    emulator: Emulator, tmp_path: Path, damage: Callable[[str], None]
) -> None:
    rented = rent(tmp_path)
    damage("zeroed page")
    result = runner("pods")
    command = re.search(r"mv \S+ \S+(?=;)", result.output)
    assert command, result.output
    subprocess.run(command[0], shell=True, check=True)
    (row,) = json.loads(runner("pods", "--json").stdout)
    assert (row["pod_id"], row["state"]) == (rented.pod.id, "ELSEWHERE")


def test_an_end_that_is_neither_confirmed_nor_recorded_is_said(
    emulator: Emulator, tmp_path: Path, damage: Callable[[str], None]
) -> None:
    rented = rent(tmp_path)
    damage("cannot be written")
    emulator.inject("undead", times=0)
    with pytest.raises(StillThereError) as error:
        rented.release()
    (problem,) = error.value.problems
    assert "MAY STILL BE RUNNING" in problem.what and f"pods terminate {rented.pod.id}" in str(problem.remedy)


def test_a_pod_that_is_kept_and_not_recorded_is_said(
    emulator: Emulator, tmp_path: Path, damage: Callable[[str], None]
) -> None:
    rented = rent(tmp_path)
    damage("cannot be written")
    with pytest.raises(StillThereError, match="is stopped, its disk costs money") as error:
        rented.release(keep=True)
    assert f"pods terminate {rented.pod.id}" in str(error.value.problems[0].remedy)
    assert [pod.status for pod in emulator.pods().values()] == ["EXITED"]


@pytest.mark.parametrize("written", ["CREATING", "PROVISIONING", "SSH_READY"])
def test_a_ledger_that_fails_while_renting_leaves_no_pod(
    emulator: Emulator, tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the write of that state on nothing can be written."""
    move, failing = Ledger.move, [False]

    def moved(self: Ledger, name: str, to: str, why: str, **facts: object) -> None:
        failing[0] = failing[0] or to == written
        if failing[0]:
            raise LedgerError(*(ledgers._unusable(self.file, sqlite3.OperationalError("disk is full")),))
        move(self, name, to, why, **facts)

    monkeypatch.setattr(Ledger, "move", moved)
    with pytest.raises(LedgerError, match="disk is full"):
        rent(tmp_path)
    assert emulator.pods() == {}


def test_reconcile_says_what_it_cannot_do(emulator: Emulator, tmp_path: Path, damage: Callable[[str], None]) -> None:
    rented = rent(tmp_path)
    rented.ledger.leave(rented.name)
    ledger = Ledger()
    damage("garbage")
    assert "cannot be written" in "".join(reconcile(RunPod(), ledger))


ON_A_FULL_DISK = """
mount -t tmpfs -o size=400k tmpfs "$RUNNER_STATE" && cp -r "$1"/* "$RUNNER_STATE"/ || exit 99
if [ "$2" = full ]; then dd if=/dev/zero of="$RUNNER_STATE/filler" bs=1k 2>/dev/null
else mount -o remount,ro "$RUNNER_STATE"; fi
touch "$RUNNER_STATE/probe" 2>/dev/null && echo x > "$RUNNER_STATE/probe" 2>/dev/null && exit 98
exec "$3" -m runner pods terminate "$4"
"""


@pytest.mark.skipif(not namespaces(), reason="no right to mount")
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_terminate_works_on_a_real_disk_that_takes_nothing(
    emulator: Emulator, tmp_path: Path, state: Path, disk: str
) -> None:
    rented = rent(tmp_path)
    kept = tmp_path / "kept"
    with closing(sqlite3.connect(state / "ledger.db")) as db:
        db.execute("pragma wal_checkpoint(truncate)")
    state.rename(kept)
    state.mkdir()
    words = ["unshare", "--mount", "sh", "-c", ON_A_FULL_DISK, "sh", str(kept), disk, sys.executable, rented.run_id]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"pod {rented.pod.id} is gone" in done.stdout, done.stdout + done.stderr
    assert emulator.pods() == {} and "ledger" in done.stderr
