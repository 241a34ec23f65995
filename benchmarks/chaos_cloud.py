"""Does a pod ever stay behind? Faults at every step of renting one, launchers killed at random moments."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.bench import Benchmark, alone, say, table

CAP_USD = 1.0
LONGEST_S = 3.5
"""A launcher without a fault takes 2 s here; a kill falls anywhere into this time."""
FAULTS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"kind": "lost", "on": "create"},
    {"kind": "lost", "on": "create", "commit": False},
    {"kind": "timeout", "on": "create", "seconds": 2},
    {"kind": "answer", "on": "create", "status": 500},
    {"kind": "answer", "on": "create", "status": 502},
    {"kind": "answer", "on": "create", "status": 429, "retry_after": 0},
    {"kind": "answer", "on": "create", "status": 401},
    {"kind": "answer", "on": "reads", "status": 502, "times": 3},
    {"kind": "answer", "on": "reads", "status": 401, "times": 2},
    {"kind": "answer", "on": "terminate", "status": 500, "times": 2},
    {"kind": "answer", "on": "terminate", "status": 403},
    {"kind": "lost", "on": "terminate"},
    {"kind": "undead"},
    {"kind": "undead", "times": 0},
    {"kind": "late_listing", "seconds": 3},
    {"kind": "no_capacity", "times": 1},
    {"kind": "bad_host"},
    {"kind": "price", "factor": 3.0, "times": 0},
    {"kind": "vanish", "seconds": 1},
    {"kind": "preempt", "seconds": 1},
)


EXPLANATION = """\
Each case is a launcher of its own that rents a pod from an [emulated RunPod](emulator.md), a process of its own, marks
it as a run would, and gives it back; one of {faults} faults is in force, or none, and half of the launchers get SIGKILL
at a random moment. Then the fault is over, and the next command puts in order what is left.

Training and agent are left out here, and caps (below they are not): of a pod that was armed when its launcher died the
case lets the deadline pass.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--cases`, `--seed`."""
    parser.add_argument("--cases", type=int, default=200, help="launchers in all (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments (default 1)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        cases = _run(Path(folder), options.cases, random.Random(options.seed))
    return {"seed": options.seed, "cases": cases}


def section(measured: dict[str, Any]) -> str:
    """By fault: how many launchers, how many were killed or left a pod, and how many pods were there at the end."""
    cases = measured["cases"]
    rows = []
    for fault in FAULTS:
        some = [case for case in cases if case["fault"] == fault]
        killed, left = sum(case["killed"] for case in some), sum(case["left"] for case in some)
        rows.append([_named(fault), *map(str, (len(some), killed, left, sum(len(case["leaked"]) for case in some)))])
    killed, left = sum(case["killed"] for case in cases), sum(case["left"] for case in cases)
    leaked = sum(len(case["leaked"]) for case in cases)
    head = ["fault", "launchers", "killed", "pods there when the launcher ended", "pods there after the next command"]
    states = ", ".join(f"{state} {n}" for state, n in _counted(c["state"] for c in cases if c["killed"]).items())
    facts = [
        f"**{leaked} pods were left** in {len(cases)} cases; {killed} launchers were killed, and the next command "
        f"ended {left - leaked} pods that were there when their launcher was gone.",
        f"Where the killed ones stood, by the ledger: {states}.",
    ]
    text = EXPLANATION.format(faults=len(FAULTS) - 1)
    return f"{text}\n{table(head, rows)}\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _named(fault: dict[str, Any] | None) -> str:
    if fault is None:
        return "none"
    return f"`{fault['kind']}`" + "".join(f" {key}={value}" for key, value in fault.items() if key != "kind")


def _run(folder: Path, cases: int, chance: random.Random) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "runner", "emulate", "--port", "0", "--root", str(folder / "runpod")]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:  # export RUNPOD_API_BASE_URL=…, export RUNPOD_API_KEY=…
            name, _, value = line.removeprefix("export ").strip().partition("=")
            os.environ[name] = value.strip("'\"")
            if name == "RUNPOD_API_KEY":
                break
        os.environ["RUNNER_STATE"] = str(folder / "state")
        os.environ["RUNNER_CACHE"] = str(folder / "cache")
        spec = _prepared()
        return [_case(number, spec, folder, chance) for number in range(cases)]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


def _prepared() -> Any:
    """Everything imported and composed once: children are forked from here."""
    import requests  # noqa: F401
    from runpod.api.rest import run_rest_request  # noqa: F401

    from runner.cloud import pod, reconcile  # noqa: F401
    from runner.resolve import resolved
    from runner.verbs.shared import request_of

    words = ("where=runpod", "hw=rtx4090", f"where.max_usd={CAP_USD}", "where.bad_host_minutes=0.01")
    return resolved(request_of((*words, "where.setup_minutes=0.2"), ()))[0]


def _case(number: int, spec: Any, folder: Path, chance: random.Random) -> dict[str, Any]:
    """One launcher, its end, and the next command's."""
    fault = FAULTS[number % len(FAULTS)]
    _ask("DELETE", "faults")
    if fault is not None:
        _ask("POST", "faults", fault)
    launcher = _forked(lambda: _launch(spec, folder / "runs" / str(number)))
    delay = chance.uniform(0.0, LONGEST_S) if chance.random() < 0.5 else None
    killed = delay is not None and not _ended(launcher, delay)
    if killed:
        os.kill(launcher, signal.SIGKILL)
    if not _ended(launcher, 90.0):
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    state, left = _states(number), len(_alive())
    _ask("DELETE", "faults")
    deadline = time.monotonic() + 60
    while (_alive() or not _settled()) and time.monotonic() < deadline:
        _ended(_forked(_next_command), 60.0)
    alive = _alive()
    for pod_id in alive:  # counted, and not left to the next case
        _ask("DELETE", f"../v2/pods/{pod_id}")
    say(f"case {number}: {fault}, killed: {killed}, {state}")
    return {
        "case": number, "fault": fault, "killed": killed, "state": state, "left": left, "leaked": alive,
    }  # fmt: skip


def _launch(spec: Any, folder: Path) -> None:
    """What a run does with a pod, without training."""
    from runner.cloud.pod import acquire
    from runner.rundir import RunDir

    class Key:
        public = "ssh-ed25519 AAAA chaos"

    rented = acquire(RunDir(folder), spec, {"hours": 0.2, "usd_per_hour": 0.74}, Key(), lambda line: None)
    rented.mark("SYNCED", "sent")
    rented.mark("RUNNING", "armed")
    for _ in range(10):
        if rented.refresh() is None:
            break
        time.sleep(0.1)
    rented.mark("COLLECTING", "done")
    time.sleep(0.2)
    rented.release()


def _next_command() -> None:
    """Any: it reconciles first. Deadlines have passed meanwhile, and answers that never came are old."""
    from runner.cloud.api import Api
    from runner.cloud.ledger import Ledger
    from runner.cloud.reconcile import reconcile

    ledger = Ledger()
    for entry in ledger.entries():
        if entry.state in ("RUNNING", "COLLECTING", "STOPPED"):
            ledger.set(entry.name, deadline=time.time() - 3600)
            if entry.state == "STOPPED":  # stopped by being taken away: a person would end it
                from runner.cloud import fleet

                fleet.terminate(Api(), ledger, entry.name)
    reconcile(Api(), ledger)


def _settled() -> bool:
    """Nothing in the ledger, but for creates that came to nothing and are looked for during a quarter of an hour."""
    from runner.cloud.ledger import Ledger

    return all(entry.state == "CREATE_UNKNOWN" for entry in Ledger().entries())


def _states(number: int) -> str:
    """Of the case's own pods."""
    from runner.cloud.ledger import Ledger

    return "+".join(sorted({entry.state for entry in Ledger().entries(str(number))})) or "none"


def _alive() -> list[str]:
    found = _ask("GET", "pods")["pods"]
    return [pod["id"] for pod in found if pod["status"] != "TERMINATED"]


def _ask(method: str, path: str, body: Any = None) -> Any:
    """Behind the emulator's curtain, or of its API."""
    url = os.environ["RUNPOD_API_BASE_URL"] + (f"/_emulator/{path}" if ".." not in path else path[2:])
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['RUNPOD_API_KEY']}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if content else None


def _forked(work: Any) -> int:
    """A child that does it and ends; what goes wrong there is the case's own business."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        work()
        code = 0
    finally:
        os._exit(code)


def _ended(child: int, seconds: float) -> bool:
    """Whether it ended within so many seconds; it is collected then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True
        time.sleep(0.02)
    return False


def _counted(words: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return dict(sorted(found.items()))


BENCHMARK = Benchmark("chaos_cloud", add_options, measure, section)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
