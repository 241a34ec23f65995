"""Data, pods and chat: files are checked before they are kept, pods end when confirmed, one model answers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from runner.ui import chat_room
from runner.ui.chat_room import ModelProcess, Question
from runner.ui.launches import Launches
from tests.support.emulated import Emulator, emulator, needs_sshd
from tests.support.front import runner
from tests.support.rented import state
from tests.ui.test_rooms import a_run

__all__ = ["emulator", "state"]
ROWS = '{"prompt": "<script>alert(1)</script>", "completion": "four"}\n{"prompt": "no answer"}\n'


def test_an_uploaded_file_is_shown_with_what_is_learned_and_what_is_wrong(page: TestClient, here: Path) -> None:
    answer = page.post("/api/upload", params={"name": "mine.jsonl"}, content=ROWS)
    assert answer.json() == {"path": "uploads/mine.jsonl"}
    assert (here / "uploads" / "mine.jsonl").read_text() == ROWS
    found = page.post("/api/preview", json={"values": {"data.path": "uploads/mine.jsonl"}, "rows": 5}).json()
    told = json.loads(runner("data", "preview", "data.path=uploads/mine.jsonl", "--json").stdout)
    assert found["preview"]["rows"] == told["rows"] and found["preview"]["files"] == told["files"]
    assert found["preview"]["num_problems"] == 1 and found["preview"]["problems"] == told["problems"]
    assert page.post("/api/upload", params={"name": "mine.jsonl"}, content=b"other").status_code == 400
    assert (here / "uploads" / "mine.jsonl").read_text() == ROWS
    assert sorted(file.name for file in (here / "uploads").iterdir()) == ["mine.jsonl"]


@pytest.mark.parametrize("name", ["", "../x.jsonl", "a/b.jsonl", ".hidden.jsonl", "x.py", "x.yaml", "x", "a\0.jsonl"])
def test_only_files_of_rows_are_taken(page: TestClient, here: Path, name: str) -> None:
    assert page.post("/api/upload", params={"name": name}, content=ROWS).status_code == 400
    assert not any((here / "uploads").glob("*"))


def test_uploads_stay_inside_where_their_folder_is_a_link(page: TestClient, here: Path) -> None:
    (here / "uploads").symlink_to(here.parent)
    assert page.post("/api/upload", params={"name": "mine.jsonl"}, content=ROWS).status_code == 400
    assert not (here.parent / "mine.jsonl").exists()


def test_the_histogram_counts_every_row(page: TestClient, here: Path) -> None:
    (here / "x.jsonl").write_text("".join(f'{{"prompt": "a", "completion": "{"b " * n}"}}\n' for n in range(1, 41)))
    found = page.post("/api/preview", json={"values": {"data.path": "x.jsonl"}}).json()["stats"]
    assert sum(bar["rows"] for bar in found["histogram"]) == found["num_rows"] <= 40


def test_without_a_key_the_room_of_pods_says_how_to_have_one(
    page: TestClient, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    found = page.get("/api/pods").json()
    assert found["account"] is False and "RUNPOD_API_KEY" in found["problems"][0]["what"]


@needs_sshd
def test_a_pod_of_the_emulator_is_listed_and_ended_when_it_is_confirmed(
    page: TestClient, emulator: Emulator, state: Path
) -> None:
    made = json.loads(runner("pods", "up", "hw=rtx4090", "--hours", "1", "--yes", "--json").stdout)
    (row,) = page.get("/api/pods").json()["pods"]
    assert (row["pod_id"], row["state"], row["usd_per_hour"]) == (made["pod_id"], "RUNNING", 0.74)
    path = f"/api/pods/{made['pod_id']}/terminate"
    for confirmed in ({}, {"confirmed": True}, {"confirmed": "other"}):
        assert page.post(path, json=confirmed).status_code == 400
    assert list(emulator.pods()) == [made["pod_id"]]
    assert page.post("/api/pods/another/terminate", json={"confirmed": "another"}).status_code == 400
    assert page.post(path, json={"confirmed": made["pod_id"]}).json() == {"ended": [made["pod_id"]]}
    assert emulator.pods() == {} and emulator.key not in page.get("/api/pods").text


ECHO = """\
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    for word in (asked["side"], " <b>", "x"):
        print(json.dumps({"text": word}), flush=True)
    if asked["prompt"] == "die":
        sys.exit(1)
    print(json.dumps({"done": True, "tokens": 3}), flush=True)
"""


@pytest.fixture
def echo(here: Path, monkeypatch: pytest.MonkeyPatch) -> ModelProcess:
    """A process that answers like a model, without one."""
    (here / "echo_model.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(here))
    monkeypatch.setattr(chat_room, "MODULE", "echo_model")
    return ModelProcess()


def test_both_sides_are_answered_by_one_process_until_it_is_stopped(here: Path, echo: ModelProcess) -> None:
    run, pids = a_run(here, "one"), set()
    for side in ("tuned", "base"):
        said = list(echo.answer(run, Question(run="one", side=side, prompt="hi")))
        assert "".join(str(piece.get("text", "")) for piece in said) == f"{side} <b>x" and said[-1]["tokens"] == 3
        assert echo._process is not None
        pids.add(echo._process.pid)
    assert len(pids) == 1 and echo.stop() is True and echo.stop() is False


def test_a_model_that_dies_or_is_left_is_ended_and_another_answers_next(here: Path, echo: ModelProcess) -> None:
    run = a_run(here, "one")
    assert list(echo.answer(run, Question(run="one", side="tuned", prompt="die")))[-1] == {"error": "stopped"}
    pieces = echo.answer(run, Question(run="one", side="tuned", prompt="hi"))
    next(pieces)
    pieces.close()  # the browser has gone
    assert list(echo.answer(run, Question(run="one", side="base", prompt="hi")))[-1]["done"] is True
    echo.stop()


def test_a_run_without_a_model_is_refused_in_words(page: TestClient, here: Path) -> None:
    assert page.post("/api/chat", json={"run": "none", "side": "tuned", "prompt": "hi"}).status_code == 400
    assert page.post("/api/chat", json={"run": "none", "side": "both", "prompt": "hi"}).status_code == 400
    assert page.post("/api/chat/stop", json={}).json() == {"stopped": False}


def test_what_the_page_starts_is_in_a_session_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the end of the server nor a closed terminal reaches it."""
    package = here / "runner"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text('import os, sys; print("Run  runs/x", os.getsid(0), sys.argv[1:])')
    monkeypatch.setenv("PYTHONPATH", str(here))
    launches = Launches(Path("runs"))
    launch = launches.start(["a=1"])
    end = time.monotonic() + 20
    while launches.state(launch)["running"] and time.monotonic() < end:
        time.sleep(0.02)
    said = launches.state(launch)
    assert said["exit_code"] == 0 and "['a=1']" in said["output"]
    assert str(os.getsid(0)) not in said["output"].split()
    assert Launches(Path("runs")).state(launch)["output"] == said["output"]  # a later server's
