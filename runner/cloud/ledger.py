"""The ledger of rented pods: written before a pod is requested, read by the next command after a crash.

One SQLite file for all runs of this user on this machine. WAL, so that two launchers write at once; `synchronous=FULL`,
so that an intent is on the disk before the request that it announces leaves. Nothing in it is secret.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

from runner.cloud import clock
from runner.cloud import process_identity as owners
from runner.errors import Problem, RequestError, RunnerError
from runner.paths import state_dir

State = Literal[
    "PLANNED", "CREATING", "CREATE_UNKNOWN", "PROVISIONING", "SSH_READY", "SYNCED", "RUNNING", "COLLECTING",
    "PARKED", "TERMINATING", "STOPPED", "PREEMPTED", "GONE",
]  # fmt: skip
"""
    PLANNED         it is about to be asked for
    CREATING        the request may have left
    CREATE_UNKNOWN  the request was not answered: the pod may exist, or appear yet
    PROVISIONING    it exists and has an id
    SSH_READY       it can be reached
    SYNCED          it has everything that the run needs
    RUNNING         its agent is armed: from here on it ends itself
    COLLECTING      the training is over, its result is being fetched
    PARKED          its run is home, and it waits for the next one of the sweep
    TERMINATING     it is to end; with `keep`, to stop
    STOPPED         kept, on purpose
    PREEMPTED       it was taken away; what is left of it is to be ended
    GONE            confirmed, or never there
"""
ARMED = ("RUNNING", "COLLECTING")
"""States of a pod that ends itself."""
PREFIX = "runner-"
"""Every pod's name begins with it: no other pod is ever touched."""
BUSY_S = 30.0
NOBODY = {"pid": None, "host": None, "pid_started": None}
PODS = f"""
create table if not exists pods (
  name text primary key, run_id text not null, run_dir text not null, state text not null, pod_id text, gpu text,
  cloud text not null, usd_per_hour real not null, disk_gb real not null, deadline real, heartbeat_s real,
  created real not null, updated real not null, ended real, detail text not null, keep integer not null,
  volume text, base text not null, account text not null, pid integer, host text, pid_started real,
  check (state in ({", ".join(repr(s) for s in get_args(State))}))
);
"""
MIGRATE = f"""
{PODS}
create index if not exists pods_by_run on pods (run_id);
create table if not exists transitions (
  time real not null, name text not null, run_id text not null, "from" text, "to" text not null, why text not null
);
"""


class LedgerError(RunnerError):
    """The ledger cannot be read or written: without it nothing may be rented. What is rented is ended all the same."""


class HeldError(RequestError):
    """Another process has a pod for the run."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One pod of the ledger."""

    name: str
    run_id: str
    run_dir: str
    state: State
    pod_id: str | None
    gpu: str | None
    cloud: str
    usd_per_hour: float
    disk_gb: float
    """Container disk and volume disk, which are paid for as well."""
    deadline: float | None
    """When its own switch ends it, epoch."""
    heartbeat_s: float | None
    """How long its agent bears a silent launcher; None for a detached run."""
    created: float
    updated: float
    """When it was last changed; of a pod that ends itself, when its launcher was last known to be there."""
    ended: float | None
    detail: str
    """Why it is in this state."""
    keep: bool
    volume: str | None
    base: str
    """Address of the API that it was rented from."""
    account: str
    """Fingerprint of the key that it was rented with."""
    pid: int | None
    host: str | None
    pid_started: float | None

    @property
    def owned(self) -> bool:
        """A living launcher holds it: nobody else may act on it."""
        return self.pid is not None and owners.owner_is_alive(self.host, self.pid, self.pid_started)

    @property
    def owned_here(self) -> bool:
        """This very process holds it."""
        return self.pid == os.getpid() and self.owned


class Ledger:
    """The file. Every method is one transaction."""

    def __init__(self, file: Path | None = None) -> None:
        """LedgerError where it cannot be opened or written."""
        self.file = file or state_dir() / "ledger.db"
        self._address = str(self.file)
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.file.exists() and not self.file.is_file():  # a pipe would be waited for for ever
                raise OSError(errno.EINVAL, "it is no plain file")
        except OSError as error:
            raise LedgerError(_unusable(self.file, error)) from None
        with self._open() as db:
            db.executescript(MIGRATE)
            _know_all_states(db)
            if (said := db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
                raise LedgerError(_unusable(self.file, sqlite3.DatabaseError(f"malformed: {said}")))

    @classmethod
    def or_copy(cls, file: Path | None = None) -> tuple[Ledger, LedgerError | None]:
        """The ledger; or a copy in memory of what can be read of one that cannot be used, and what is wrong with it.

        For whoever ends pods or looks at them: that works without a ledger, and from the copy it is known which.
        """
        try:
            return cls(file), None
        except LedgerError as error:
            copy = cls.__new__(cls)
            copy.file = file or state_dir() / "ledger.db"
            copy._address = f"file:runner-{id(copy)}?mode=memory&cache=shared"
            copy._alive = copy._connect()  # the memory is there as long as one connection is
            copy._alive.executescript(MIGRATE)
            for row in _readable(copy.file):
                with suppress(sqlite3.Error), copy._open() as db:
                    cls._insert(db, row)
            return copy, error

    _alive: sqlite3.Connection | None = None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._address, timeout=BUSY_S, isolation_level=None, uri=self._address.startswith("file:")
        )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own: none is shared between threads or survives a fork. LedgerError where it fails."""
        try:
            with self._connected() as db:
                yield db
        except sqlite3.Error as error:
            raise LedgerError(_unusable(self.file, error)) from None

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        db = self._connect()
        try:
            db.row_factory = sqlite3.Row
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=full")
            yield db
        finally:
            db.close()

    def plan(
        self, name: str, *, run_id: str, run_dir: str, gpu: str | None, cloud: str, usd_per_hour: float, disk_gb: float,
        keep: bool, volume: str | None, base: str, account: str, heartbeat_s: float | None,
    ) -> None:  # fmt: skip
        """A pod is about to be asked for, by this process. HeldError where another one has a pod for the same run."""
        now = clock.now()
        row = {
            "name": name, "run_id": run_id, "run_dir": run_dir, "state": "PLANNED", "gpu": gpu, "cloud": cloud,
            "usd_per_hour": usd_per_hour, "disk_gb": disk_gb, "created": now, "updated": now, "detail": "planned",
            "keep": int(keep), "volume": volume, "base": base, "account": account, "heartbeat_s": heartbeat_s,
            **owner(),
        }  # fmt: skip
        with self._write() as db:
            query = "select * from pods where run_id = ? and state != 'GONE'"
            for other in map(_entry, db.execute(query, (run_id,)).fetchall()):
                if other.owned and not other.owned_here:
                    what = f"{run_id} is running in pod {other.pod_id or other.name}: process {other.pid} follows it"
                    raise HeldError(Problem(what, "command line", f"python -m runner logs {run_id} -f looks on"))
            self._insert(db, row)
            self._log(db, name, run_id, None, "PLANNED", "planned")

    def move(self, name: str, state: State, why: str, **facts: object) -> None:
        """Record a new state before acting on it; `facts` are columns that are known now.

        A state that a pod is in already is written again, with its reason.
        """
        if state == "GONE":
            facts = {"ended": clock.now(), **NOBODY} | facts
        with self._write() as db:
            row = db.execute("select run_id, state from pods where name = ?", (name,)).fetchone()
            if row is None:
                raise LedgerError(Problem(f"the ledger {self.file} has no pod {name}"))
            values = {"state": state, "detail": why, "updated": clock.now(), **facts}
            self._set(db, name, values)
            self._log(db, name, row["run_id"], row["state"], state, why)

    def try_move(self, name: str, state: State, why: str, **facts: object) -> bool:
        """Like `move`, but return False if it cannot be written."""
        try:
            self.move(name, state, why, **facts)
        except LedgerError:
            return False
        return True

    def set(self, name: str, **facts: object) -> None:
        """Facts without a change of state."""
        with self._write() as db:
            self._set(db, name, {"updated": clock.now(), **facts})

    def take(self, name: str) -> bool:
        """Make this process the owner; False where a living one has it."""
        with self._write() as db:
            row = db.execute("select * from pods where name = ?", (name,)).fetchone()
            found = _entry(row) if row is not None else None
            if found is None or (found.owned and not found.owned_here):
                return False
            self._set(db, name, owner())
            return True

    def hand_over(self, old: str, name: str, *, run_id: str, run_dir: str, heartbeat_s: float | None,
                  running: bool = False) -> Entry | None:  # fmt: skip
        """A parked or stopped pod becomes another run's, or the same one's again, held by this process; None where
        another one was faster.

        The old entry ends with the moment in which the pod was parked, and the new one begins with it, under a name of
        its own (the provider's stays): no second is counted twice, or not at all. A stopped pod's begins now, and so
        does one that is `running` for a person, whom it is taken from.
        """
        with self._write() as db:
            query = "select * from pods where name = ? and state in ('PARKED', 'STOPPED', 'RUNNING')"
            row = db.execute(query, (old,)).fetchone()
            if row is None or (row["state"] == "RUNNING" and not running):
                return None
            if row["state"] != "PARKED" and (was := _entry(row)).owned and not was.owned_here:
                return None
            now = clock.now()
            parked = now if row["state"] == "RUNNING" else row["updated"]
            told = f"handed on to run {run_id}"
            gone = {"state": "GONE", "ended": parked, "updated": now, "detail": told, **NOBODY}
            self._set(db, old, gone)
            self._log(db, old, row["run_id"], row["state"], "GONE", told)
            why = f"taken over from run {row['run_id']}"
            new: dict[str, Any] = {
                "name": name,
                "run_id": run_id,
                "run_dir": run_dir,
                "heartbeat_s": heartbeat_s,
                "state": "SSH_READY",
            }
            new |= {"updated": now, "ended": None, "detail": why, **owner()}
            new["created"] = now if row["state"] == "STOPPED" else parked
            self._insert(db, {**row, **new})
            self._log(db, name, run_id, None, "SSH_READY", why)
        return self.entry(name)

    def leave(self, name: str, heard: bool = True) -> None:
        """Release ownership. Never raises: this process will be gone, and be found to be.

        The silence of which a pod that trains ends itself counts from now on, unless its launcher is not `heard` of by
        this. A pod that is parked is paid for by its run until it was parked.
        """
        with suppress(LedgerError), self._write() as db:
            self._set(db, name, NOBODY)
            if heard:
                query = f"update pods set updated = max(updated, ?) where name = ? and state in {ARMED}"
                db.execute(query, (clock.now(), name))

    def entry(self, name: str) -> Entry | None:
        """Return the entry with this pod name."""
        with self._open() as db:
            row = db.execute("select * from pods where name = ?", (name,)).fetchone()
        return _entry(row) if row is not None else None

    def entries(self, run_id: str | None = None, *, gone: bool = False) -> list[Entry]:
        """Oldest first; those that are gone only if asked for."""
        with self._open() as db:
            rows = db.execute("select * from pods order by created").fetchall()
        found = [_entry(row) for row in rows]
        return [e for e in found if (gone or e.state != "GONE") and run_id in (None, e.run_id)]

    def transitions(self, name: str) -> list[tuple[str | None, str, str]]:
        """Return state transitions in order: from, to and reason."""
        with self._open() as db:
            query = 'select "from", "to", why from transitions where name = ? order by rowid'
            return [tuple(row) for row in db.execute(query, (name,))]

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            db.execute("begin immediate")
            try:
                yield db
                db.execute("commit")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    db.execute("rollback")
                raise

    @staticmethod
    def _insert(db: sqlite3.Connection, row: dict[str, object]) -> None:
        marks = ", ".join(f":{key}" for key in row)
        db.execute(f"insert into pods ({', '.join(row)}) values ({marks})", row)

    @staticmethod
    def _set(db: sqlite3.Connection, name: str, values: dict[str, Any]) -> None:
        marks = ", ".join(f"{key} = :{key}" for key in values)
        db.execute(f"update pods set {marks} where name = :_name", {**values, "_name": name})

    @staticmethod
    def _log(db: sqlite3.Connection, name: str, run_id: str, old: str | None, new: str, why: str) -> None:
        db.execute("insert into transitions values (?, ?, ?, ?, ?, ?)", (clock.now(), name, run_id, old, new, why))


def _unusable(file: Path, error: Exception) -> Problem:
    """The ledger, what is wrong with it, and what to do about it."""
    said = str(error)
    if isinstance(error, OSError):
        said = error.strerror or said
    if any(word in said for word in ("no plain file", "malformed", "not a database")):
        remedy = f"mv {file} {file}.broken; python -m runner pods then lists what there is"
    elif "locked" in said:
        remedy = "another process of yours holds it: end that, or try again"
    else:
        remedy = "make room there, or set RUNNER_STATE=FOLDER to one that can be written to"
    return Problem(f"the ledger {file} cannot be written: {said}", None, remedy)


def _readable(file: Path) -> list[dict[str, object]]:
    """Rows of a ledger that cannot be written, as far as they can be read."""
    rows: list[dict[str, Any]] = []
    if not file.is_file():
        return rows
    for way in ("mode=ro", "mode=ro&immutable=1"):  # the second one where no file can be made beside it
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{quote(str(file))}?{way}", uri=True)) as db:
            db.row_factory = sqlite3.Row
            for row in db.execute("select * from pods"):
                rows.append(dict(row))
        if rows:
            break
    return rows


def _entry(row: sqlite3.Row) -> Entry:
    values = {f.name: row[f.name] for f in fields(Entry)}
    return Entry(**{**values, "keep": bool(values["keep"])})


def _know_all_states(db: sqlite3.Connection) -> None:
    """A ledger of an earlier version refuses states that came later: SQLite changes no check of a table in place."""
    if "'PARKED'" in _table(db):
        return
    db.execute("begin immediate")
    if "'PARKED'" not in _table(db):  # another process may have been faster
        db.execute("alter table pods rename to pods_before")
        db.execute(PODS)
        db.execute("insert into pods select * from pods_before")
        db.execute("drop table pods_before")
        db.execute("create index pods_by_run on pods (run_id)")
    db.execute("commit")


def _table(db: sqlite3.Connection) -> str:
    return str(db.execute("select sql from sqlite_master where name = 'pods'").fetchone()["sql"])


def owner(pid: int | None = None) -> dict[str, object]:
    """Columns that say who holds a pod: this process, or another one that can be seen from here."""
    if pid is None:
        owners.hold_lock()
    return owners.identity_columns(pid)
