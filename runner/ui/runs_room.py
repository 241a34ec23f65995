"""Runs: the list, a run live, and what is done with one: start, stop, resume, delete."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Body
from fastapi.responses import HTMLResponse, StreamingResponse

from runner.config.compose import Sources, compose
from runner.errors import Problem, RequestError
from runner.report import comparison
from runner.report.run_list import run_rows
from runner.report.run_report.facts import gather
from runner.report.run_report.page import page
from runner.resolve import plan_inputs
from runner.resolve.steps import resolve
from runner.rundir import checkpoints
from runner.rundir.directory import ACTIVE, YAML_FILE, RunDir, display_path, is_alive, text_of
from runner.rundir.json_files import MetricsLine
from runner.runs import trash
from runner.ui import confined, run_feed
from runner.ui.compose_room import one_at_a_time
from runner.ui.form_request import names_of, request_of, words_of
from runner.ui.launches import Launches
from runner.ui.run_feed import metric_columns
from runner.ui.safe_json import SafeJson, without_secrets

REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
"""A report has its own scripts in it: the sandbox gives it an origin of its own, which can ask this server nothing."""
MOST_COMPARED = 20
PENNY = 0.005
"""US$ an hour by which a confirmed price may be passed: it was shown rounded."""


def router(output_dir: Path) -> APIRouter:
    """The routes, for the runs below `output_dir`."""
    api = APIRouter(prefix="/api")
    launches, snapshots = Launches(output_dir), run_feed.Snapshots()

    @api.get("/runs")
    def runs() -> SafeJson:
        return SafeJson(run_rows(output_dir)[::-1])

    @api.post("/runs")
    def start(asked: dict[str, Any] = Body()) -> SafeJson:  # noqa: B008  # FastAPI's way
        words = words_of(asked)
        with one_at_a_time():
            rented = _check_price(words, asked.get("usd_per_hour"))
        if not any(word.startswith("run.output_dir=") for word in words):
            words.append(f"run.output_dir={display_path(output_dir)}")
        return SafeJson({"launch": launches.start([*words, *(["--yes"] if rented else [])])})

    @api.get("/launches/{launch}")
    def launch_state(launch: str) -> SafeJson:
        return SafeJson(launches.state(launch))

    @api.get("/runs/{run_id}")
    def one(run_id: str) -> SafeJson:
        return SafeJson(_facts(confined.run_of(run_id, output_dir), snapshots))

    @api.get("/runs/{run_id}/events")
    async def follow(run_id: str) -> StreamingResponse:
        run = confined.run_of(run_id, output_dir)
        return StreamingResponse(run_feed.events(run, snapshots), media_type="text/event-stream")

    @api.get("/runs/{run_id}/report")
    def report(run_id: str) -> HTMLResponse:
        run = confined.run_of(run_id, output_dir)
        return HTMLResponse(without_secrets(page([gather(run)])), headers={"content-security-policy": REPORT_POLICY})

    @api.post("/runs/{run_id}/stop")
    def stop_run(run_id: str) -> SafeJson:
        run = confined.run_of(run_id, output_dir)
        return SafeJson({"pid": stop(run)})

    @api.post("/runs/{run_id}/resume")
    def resume(run_id: str) -> SafeJson:
        run = confined.run_of(run_id, output_dir)
        _refuse_rented(run)
        return SafeJson({"launch": launches.start(["resume", display_path(run.path)])})

    @api.post("/runs/{run_id}/delete")
    def delete(run_id: str) -> SafeJson:
        run = confined.run_of(run_id, output_dir)
        ((_, target),) = trash.delete((run.path,), output_dir)
        return SafeJson({"trash": display_path(target)})

    @api.post("/compare")
    def compare_runs(asked: dict[str, Any] = Body()) -> SafeJson:  # noqa: B008
        ids = names_of(asked, "runs")[:MOST_COMPARED]
        found = [confined.run_of(run_id, output_dir) for run_id in ids]
        if len(found) < 2:
            raise RequestError(Problem("a comparison needs two runs", "page", "select another one in the list"))
        compared = comparison.compare(found)
        facts = {"metric": compared.metric, "mode": compared.mode, "results": compared.results, "notes": compared.notes}
        return SafeJson({**facts, "differences": compared.chosen(), "curves": _curves(found)})

    return api


def _curves(runs: list[RunDir]) -> dict[str, Any]:
    """Loss by step of each run."""
    return {
        run.id: metric_columns((run.path / "metrics.jsonl").read_bytes(), MetricsLine, ("step", "loss"))
        for run in runs
        if (run.path / "metrics.jsonl").is_file()
    }


def _facts(run: RunDir, snapshots: run_feed.Snapshots) -> dict[str, Any]:
    """All of a run that does not change by the second."""
    return {
        "state": snapshots.of(run),
        "yaml": text_of(run.path / YAML_FILE),
        "summary": run.summary,
        "plan": {key: value for key, value in run.read("plan.json").items() if key in ("peak_gib", "hours", "usd")},
        "checkpoints": checkpoints.complete(run),
        "path": display_path(run.path),
    }


def _check_price(words: list[str], confirmed: object) -> bool:
    """True for a run that is rented, at the price that was confirmed; RequestError for another price, or none."""
    request = request_of(words)
    spec, notes = resolve(compose(request), Sources(request))
    confined.check_spec(spec)
    if not spec.is_rented:
        return False
    planned = plan_inputs.plan_if_known(spec, notes)
    usd = planned.usd_per_hour if planned else None
    if usd is None:
        what = "the price of this machine is not known here, so nobody can agree to it"
        raise RequestError(Problem(what, "page", "start it in a terminal, which asks the provider first"))
    if not isinstance(confirmed, int | float) or confirmed + PENNY < usd:
        raise RequestError(Problem(f"renting costs ${usd:.2f} an hour, which was not confirmed", "page"))
    return True


def _refuse_rented(run: RunDir) -> None:
    if run.spec.is_rented:
        what = "this run was rented, and to resume it rents again"
        remedy = f"python -m runner resume {display_path(run.path)} shows the price and asks"
        raise RequestError(Problem(what, "page", remedy))


def stop(run: RunDir) -> int:
    """Stop a run as Ctrl-C does: it saves a checkpoint and ends; the process that was told.

    RequestError for a run that is not running, or not on this machine.
    """
    status = run.status
    if run.state(status) not in ACTIVE:
        raise RequestError(Problem(f"{run.id} is not running: its state is {run.state(status)}", "page"))
    owner = run.read(".owner")
    host, pid = owner.get("host"), owner.get("pid")
    if host != socket.gethostname() or not isinstance(pid, int) or not is_alive(pid):
        host, pid = status.get("host"), status.get("pid")
        if host != socket.gethostname() or not isinstance(pid, int) or not is_alive(pid, status.get("born")):
            remedy = "stop it where it runs; a pod is ended by python -m runner pods terminate"
            raise RequestError(Problem(f"{run.id} is not run by a process of this machine", "page", remedy))
    try:
        os.kill(pid, signal.SIGINT)
    except OSError as error:
        raise RequestError(Problem(f"process {pid} cannot be stopped: {error.strerror}", "page")) from None
    return pid
