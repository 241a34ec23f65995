"""A run directory is unique, its files are whole, and its state is true even after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest

from runner.errors import RequestError
from runner.rundir.directory import ACTIVE, RunDir, all_runs, is_alive, write_atomically
from runner.spec import RunSpec
from tests.support.front import runner, spec_of


@cache
def _main_job() -> RunSpec:
    return spec_of()


@pytest.fixture
def spec(here: Path) -> RunSpec:
    return _main_job()


def test_every_run_gets_a_directory_of_its_own(spec: RunSpec) -> None:
    runs = [RunDir.create(spec) for _ in range(20)]
    assert len({run.id for run in runs}) == 20
    assert all(run.id.startswith("smollm2_135m-lora-20") for run in runs)


def test_an_id_that_is_taken_is_never_used_again(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("runner.rundir.directory.secrets.token_hex", lambda n: next(digits))
    monkeypatch.setattr("runner.rundir.directory.datetime", _Noon)
    assert [RunDir.create(spec).id[-4:] for _ in range(2)] == ["aaaa", "bbbb"]


def test_it_holds_the_resolved_run_and_its_state(here: Path) -> None:
    named = spec_of("run.name=try", "run.output_dir=out")
    run = RunDir.create(named, sweep="sweep-1")
    assert run.path.parent == Path("out") and run.id.startswith("try-")
    assert RunSpec.model_validate_json(run.spec_file.read_text("utf-8")) == named
    status = run.read("status.json")
    assert (run.state(), status["run_id"], status["sweep"], status["model"]) == (
        "created", run.id, "sweep-1", "smollm2_135m",
    )  # fmt: skip
    assert (run.path / "logs").is_dir()


def test_facts_stay_when_the_state_moves(spec: RunSpec) -> None:
    run = RunDir.create(spec)
    run.set_status("training", num_steps=7)
    run.set_status("done", exit_code=0)
    status = run.read("status.json")
    assert (status["num_steps"], status["exit_code"], status["method"]) == (7, 0, "lora")
    assert status["updated"] >= status["created"]


def test_a_place_that_cannot_be_written_to_is_a_wrong_request(here: Path) -> None:
    (here / "file").write_text("")
    with pytest.raises(RequestError, match=r"run\.output_dir=file cannot be written to: Not a directory"):
        RunDir.create(spec_of("run.output_dir=file"))


@pytest.mark.parametrize("state", ["done", "failed", "interrupted"])
def test_a_run_that_has_ended_stays_what_it_was(spec: RunSpec, state: str) -> None:
    run = RunDir.create(spec)
    run.set_status(state)
    run.write("status.json", {**run.read("status.json"), "pid": _dead_pid()})
    assert run.state() == state


@pytest.mark.parametrize("state", ACTIVE)
def test_a_run_whose_process_is_gone_was_killed(spec: RunSpec, state: str) -> None:
    run = RunDir.create(spec)
    run.set_status(state)
    assert run.state() == state  # this process is alive
    run.write("status.json", {**run.read("status.json"), "pid": _dead_pid()})
    assert run.state() == "killed"
    run.write("status.json", {**run.read("status.json"), "host": "another"})
    assert run.state() == state  # who can tell from here


def test_a_directory_without_a_status_is_unknown(tmp_path: Path) -> None:
    assert RunDir(tmp_path).state() == "unknown"
    (tmp_path / "status.json").write_text('{"state": "do')
    assert RunDir(tmp_path).state() == "unknown"


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, "old")

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1])
    write_atomically(tmp_path / "file", "text")
    assert calls == ["fsync", "rename"]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_metrics_pass_over_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in RunDir(tmp_path).metrics()] == [1, 2]
    assert list(RunDir(tmp_path).evals()) == []


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    for name, created in (("c", 3.0), ("a", 2.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps({"created": created}))
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "empty").mkdir()
    assert [run.id for run in all_runs(tmp_path)] == ["b", "a", "c"]
    assert all_runs(tmp_path / "nowhere") == []


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


class _Noon:
    """A clock that stands still."""

    @staticmethod
    def now() -> datetime:
        return datetime(2025, 1, 1, 12)


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet collected
        assert not is_alive(child.pid)
    finally:
        child.wait()
    assert is_alive(os.getpid()) and not is_alive(None)


def test_a_spec_that_somebody_has_broken_is_told_by_its_key(spec: RunSpec) -> None:
    run = RunDir.create(spec)
    for path in (run.path, run.spec_file, Path(run.id)):
        assert RunDir.find(path).path == Path("runs") / run.id and RunDir.at(path) == RunDir.find(path)
    assert run.spec == spec and RunDir.at(Path("none")) is None
    run.write("spec.json", {**run.read("spec.json"), "train": {"max_stepz": 3}})
    with pytest.raises(RequestError, match=r"unknown key train\.max_stepz"):
        _ = run.spec
    with pytest.raises(RequestError, match=f"there is no run {run.id[:-1]}") as caught:
        RunDir.find(Path(run.id[:-1]))
    assert caught.value.problems[0].remedy == f"did you mean runs/{run.id}?"


VERBS = ("chat", "merge", "export", "resume", "logs")


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"[]", b"\xff\xfe\x00"])
def test_a_spec_that_is_lost_or_damaged_is_told_with_how_to_restore_it(
    spec: RunSpec, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    run = RunDir.create(spec)
    run.set_status("failed")
    before = run.spec_file.read_text("utf-8")
    if content is None:
        run.spec_file.unlink()
    else:
        run.spec_file.write_bytes(content)
    what = "it has no spec.json" if content is None else "spec.json"
    for verb in VERBS:
        result = runner(verb, str(run.path))
        said = " ".join(result.stderr.split())
        assert result.exit_code == 2 and what in said and "did you mean" not in said, result.output
        assert f"show {run.path}/training.yaml --json > {run.spec_file} writes it again" in said, verb
    assert runner("show", str(run.path / "training.yaml"), "--json").stdout == before
    (run.path / "training.yaml").unlink()
    assert "bring spec.json back from a copy" in runner("resume", str(run.path)).stderr


def test_every_verb_finds_the_run_that_was_nearly_named(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    run = RunDir.create(spec)
    for word in (run.id[:-1], f"runs/{run.id[:-1]}"):
        for verb in VERBS:
            assert f"did you mean runs/{run.id}?" in runner(verb, word).stderr, verb
