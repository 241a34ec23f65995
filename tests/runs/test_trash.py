"""`runs delete` moves runs to a trash and says how to undo it; a run at work or with a pod is refused."""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cloud.ledger import Ledger
from runner.errors import RequestError
from runner.rundir.directory import RunDir, process_birth
from runner.runs import trash
from tests.conftest import run_cli
from tests.report.test_comparison import made


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path / "state"))


def test_a_deleted_run_is_listed_no_more_and_comes_back_with_the_words_that_were_said(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made(tmp_path / "runs", name, {}, 1.0)
    said = run_cli("runs", "delete", "one", "runs/two", cwd=tmp_path, code=0).stdout
    assert "Moved   runs/one to runs/.trash/one" in said
    assert json.loads(run_cli("runs", "--json", cwd=tmp_path, code=0).stdout) == []
    assert run_cli("runs", "restore", cwd=tmp_path, code=0).stdout.split() == ["one", "two"]
    undo = next(line.removeprefix("Undo").strip() for line in said.splitlines() if line.startswith("Undo"))
    words = shlex.split(undo[undo.index("runs restore") :])
    run_cli(*words, cwd=tmp_path, code=0)
    rows = json.loads(run_cli("runs", "--json", cwd=tmp_path, code=0).stdout)
    assert sorted(row["run_id"] for row in rows) == ["one", "two"]
    moved = json.loads(run_cli("runs", "--output-dir", "runs", "delete", "one", "--json", cwd=tmp_path, code=0).stdout)
    assert [row["run_id"] for row in moved] == ["one"]


def test_nothing_is_moved_where_one_of_them_may_not_be(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    idle = made(out, "idle", {}, 1.0)
    busy = made(out, "busy", {}, state="training")
    here = {"pid": os.getpid(), "host": socket.gethostname(), "born": process_birth(os.getpid())}
    busy.write("status.json", {**busy.status, **here})
    ledger = Ledger()
    ledger.plan(
        "runner-rented-1", run_id="rented", run_dir="", gpu=None, cloud="secure", usd_per_hour=1.0, disk_gb=1.0,
        keep=False, volume=None, base="", account="", heartbeat_s=None,
    )  # fmt: skip
    made(out, "rented", {}, 1.0)
    with pytest.raises(RequestError) as refused:
        trash.delete((idle.path, busy.path, Path("rented"), Path("no-such")), out)
    told = [problem.what for problem in refused.value.problems]
    assert told[0] == f"busy is running (training, process {os.getpid()})"
    assert told[1] == "rented has a pod, runner-rented-1 (PLANNED)" and "no run no-such" in told[2]
    assert "pods terminate rented" in str(refused.value.problems[1].remedy)
    assert idle.path.is_dir() and not (out / ".trash").exists()
    ledger.move("runner-rented-1", "GONE", "ended")
    trash.delete((Path("rented"),), out)
    assert trash.trashed_ids(out) == ["rented"]


def test_a_run_that_somebody_starts_at_this_moment_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path, "run", {}, 1.0)
    code = (
        "import sys, pathlib\nfrom runner.rundir.lock import own_run\nfrom runner.rundir.directory import RunDir\n"
        "with own_run(RunDir(pathlib.Path(sys.argv[1]))):\n print('owned', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "owned\n"
        with pytest.raises(RequestError, match="is running"):
            trash.delete((run.path,), tmp_path)
    finally:
        owner.communicate("")
    assert run.path.is_dir()


def test_a_trash_on_another_disk_gets_a_whole_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, "run", {}, 1.0)
    (run.path / "last").symlink_to("checkpoints")
    renamed = Path.rename

    def across(self: Path, target: Path) -> Path:
        if self.name == "run":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", across)
    ((_, to),) = trash.delete((run.path,), tmp_path)
    assert not run.path.exists() and os.readlink(to / "last") == "checkpoints" and RunDir(to).summary
    ((_, back),) = trash.restore((Path("run"),), tmp_path)
    assert back == run.path and RunDir(back).summary and trash.trashed_ids(tmp_path) == []


def test_damaged_linked_and_doubled_runs(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    damaged = made(out, "damaged", {}, 1.0)
    (damaged.path / "spec.json").unlink()
    real = made(tmp_path / "disk", "linked", {}, 1.0)
    (out / "linked").symlink_to(real.path)
    trash.delete((damaged.path, out / "linked"), out)
    assert real.path.is_dir() and (out / ".trash" / "linked").is_symlink()  # the link went, not what it leads to
    made(out, "damaged", {}, 1.0)
    with pytest.raises(RequestError, match="is there already"):
        trash.restore((Path("damaged"),), out)
    with pytest.raises(RequestError, match="the trash has a run damaged already"):
        trash.delete((Path("damaged"),), out)
    with pytest.raises(RequestError, match="is not in the trash"):
        trash.restore((Path("other"),), out)
