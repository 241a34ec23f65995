"""The webhook of `run.notify` is told how a run ended; it stops or delays no run, and no file has its address."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RequestError, RunFailedError
from runner.rundir.directory import Outcome, RunDir
from runner.rundir.launch_options import LaunchOptions
from runner.runs import notify
from tests.conftest import run_cli, spec_of
from tests.report.test_comparison import made

SECRET = "T0P-S3CRET"


class Hook(http.server.ThreadingHTTPServer):
    """A webhook: what it was sent, and how it answers."""

    def __init__(self) -> None:
        self.code, self.delay = 200, 0.0
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/{SECRET}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(self.server.delay)
        self.send_response(self.server.code)
        if self.server.code in (301, 307):
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.paths.append(self.path)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    with Hook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RUN_WEBHOOK", server.address)
        yield server
        server.shutdown()


def told(run: RunDir, outcome: Outcome | BaseException, *words: str) -> list[str]:
    """What is said here when a run ends so."""
    said: list[str] = []
    spec = spec_of("run.notify=env:RUN_WEBHOOK", *words)
    with suppress(RunFailedError), notify.notifying(run, spec, said.append) as ended:
        if isinstance(outcome, BaseException):
            raise outcome
        ended(outcome)
    return said


def test_each_end_is_told_as_its_event(hook: Hook, tmp_path: Path) -> None:
    run = made(tmp_path, "run", {}, 1.5)
    assert told(run, Outcome(run, 0)) == []
    assert hook.got[0]["text"] == hook.got[0]["content"] == "run: done, after 1 min 15 s, held-out loss 2.0000 → 1.5000"
    failed = made(tmp_path, "failed", {}, state="failed")
    cost = dict.fromkeys(("predicted_usd", "predicted_hours", "gpu", "cloud")) | {"usd": 1.25, "hours": 1.0}
    cost |= {"usd_per_hour": 1.25, "pod_id": "p"}
    failed.write("status.json", {**failed.status, "error": "no \x1b[2Jroom", "cost": cost})
    told(failed, Outcome(failed, 1))
    told(failed, Outcome(failed, 130, "where.max_usd=2 is nearly spent"))
    told(failed, RunFailedError("the pod has gone"))
    assert [(got["event"], got["text"]) for got in hook.got[1:]] == [
        ("failure", "failed: failed, $1.25, no room"),
        ("cap", "failed: where.max_usd was reached, $1.25, where.max_usd=2 is nearly spent"),
        ("failure", "failed: failed, $1.25, the pod has gone"),
    ]
    told(run, Outcome(run, 0), "run.notify_on=[failure]")
    assert len(hook.got) == 4


@pytest.mark.parametrize(("code", "said"), [(500, "the server answered 500"), (307, "the server answered 307")])
def test_a_server_that_refuses_or_sends_elsewhere_is_told_without_its_address(
    code: int, said: str, hook: Hook, tmp_path: Path
) -> None:
    hook.code = code
    run = made(tmp_path, "run", {}, 1.5)
    (note,) = told(run, Outcome(run, 0))
    assert note == f"Note    run.notify=env:RUN_WEBHOOK was not told: {said}"
    assert len(hook.paths) == 1  # no redirect is followed


def test_a_slow_or_absent_server_holds_up_nothing(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, "run", {}, 1.5)
    monkeypatch.setattr(notify, "SECONDS", 0.3)
    hook.delay = 3.0
    start = time.monotonic()
    (note,) = told(run, Outcome(run, 0))
    assert time.monotonic() - start < 2 and (
        "no answer within" in note or "timed out" in note or "TimeoutError" in note
    )
    for address in ("http://127.0.0.1:1/x", f"http://[::1/{SECRET}", "http://no-such-host.invalid/x"):
        monkeypatch.setenv("RUN_WEBHOOK", address)
        (note,) = told(run, Outcome(run, 0))
        assert SECRET not in note and "127.0.0.1" not in note
    (run.path / "summary.json").write_text('{"eval": []}', "utf-8")
    told(run, Outcome(run, 0))


def test_slack_discord_and_ntfy_get_what_they_read() -> None:
    message = {"text": "run: done", "event": "end", "run_id": "run"}
    assert notify.body_of("https://hooks.slack.com/services/x", message)[0] == b'{"text": "run: done"}'
    assert json.loads(notify.body_of("https://discord.com/api/webhooks/x", message)[0])["content"] == "run: done"
    body, headers = notify.body_of("https://ntfy.sh/mine", message)
    assert body == b"run: done" and headers["Title"] == "runner: end"


def test_what_cannot_be_told_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("run.notify=SLACK_WEBHOOK")
    assert spec.run.notify == "env:SLACK_WEBHOOK"
    monkeypatch.delenv("SLACK_WEBHOOK", raising=False)
    with pytest.raises(RequestError, match="is not set"):
        notify.check_notify(spec, LaunchOptions())
    monkeypatch.setenv("SLACK_WEBHOOK", f"hooks.slack.com/{SECRET}")
    with pytest.raises(RequestError, match="holds no address") as refused:
        notify.check_notify(spec, LaunchOptions())
    assert SECRET not in str(vars(refused.value.problems[0]))
    with pytest.raises(RequestError, match="--detach leaves"):
        notify.check_notify(spec, LaunchOptions(detach=True))
    notify.check_notify(spec_of(), LaunchOptions(detach=True))


@pytest.mark.parametrize("word", [f"run.notify=https://hooks.slack.com/{SECRET}", f'run.notify="ntfy.sh/{SECRET}"'])
def test_an_address_on_the_command_line_is_refused_and_not_repeated(word: str, tmp_path: Path) -> None:
    done = run_cli(word, "--json", cwd=tmp_path, code=2)
    assert "write export NOTIFY_WEBHOOK=ADDRESS and then run.notify=env:NOTIFY_WEBHOOK" in done.stderr
    assert SECRET not in done.stdout + done.stderr and not list(tmp_path.rglob("*spec*"))


def test_a_run_is_told_and_none_of_its_files_has_the_address(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.runs import launch

    class Executor:
        @staticmethod
        def execute(run: RunDir, spec: Any, **options: Any) -> Outcome:
            run.set_status("done", exit_code=0)
            return Outcome(run, 0)

    monkeypatch.setattr(launch, "executor_of", lambda spec: Executor)
    from rich.console import Console

    spec = spec_of("run.notify=RUN_WEBHOOK", f"run.output_dir={tmp_path}")
    outcome = launch.create_and_execute(spec, [], Console(quiet=True), False)
    assert [got["run_id"] for got in hook.got] == [outcome.run.id] and hook.paths == [f"/services/{SECRET}"]
    files = [file for file in outcome.run.path.rglob("*") if file.is_file()]
    assert len(files) >= 3 and not [file for file in files if SECRET.encode() in file.read_bytes()]
