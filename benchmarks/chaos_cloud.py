"""Launchers that rent a pod under faults of RunPod's or harm to their own machine, and get killed: is a pod left?"""

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cases, launchers
from benchmarks.bench import Benchmark, alone, table
from benchmarks.harm import DAY_S, HARMS, Harm
from tests.support.disks import unshare

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
    {"kind": "double"},
    {"kind": "answer", "on": "list", "status": 500, "times": 0},
    {"kind": "answer", "on": "terminate", "status": 502, "times": 6},
    {"kind": "answer", "on": "terminate", "status": 429, "times": 3, "retry_after": 0},
    {"kind": "timeout", "on": "terminate", "seconds": 2},
    {"kind": "skew", "seconds": DAY_S},
    {"kind": "skew", "seconds": -DAY_S},
    {"kind": "price", "factor": 3.0, "times": 0},
    {"kind": "vanish", "seconds": 1},
    {"kind": "preempt", "seconds": 1},
)
TROUBLES: tuple[tuple[dict[str, Any] | None, str | None], ...] = (
    *((fault, None) for fault in FAULTS),
    *((None, harm) for harm in HARMS),
)
"""A fault of RunPod's, or a harm to the launcher's machine."""
ALONE_MINUTES = 0.2
"""So long after its start a pod whose ledger may be lost ends itself: its start command sees that no agent came."""
LEFT_S = 60.0
LOUD = "MAY STILL BE RUNNING"


EXPLANATION = """\
In each case a launcher rents a pod from an [emulated RunPod](emulator.md) in another process, records it as a run
would, and ends it. One fault is active, from the start or from a random moment: one of {faults} faults of RunPod
(such as a clock that is a day off), or one of {harms} faults of the launcher's machine. Half of the launchers get
SIGKILL at a random moment. Then the fault ends: a full disk has space again, a damaged ledger is moved away as its
message says. The next command must settle what is left.

There is no training, agent or budget in these cases (see below for those). If a pod was armed when its launcher died,
its deadline is made to pass. A pod whose ledger is lost is ended by its start command, here after {alone:.0f} s.

- *silent*: launchers that ended while a pod existed, without a message that it may still be running;
- *crashed*: launchers that ended with a stack trace;
- *robbed*: launchers whose pod was ended by another command.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--cases`, `--seed`, `--at-once`."""
    cases.add_options(parser, 8 * len(TROUBLES), 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases, in lanes beside one another: processes with an emulator each."""
    kept = cases.Kept(BENCHMARK.name, options.seed)
    missing = kept.missing(options.cases)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        lanes = [
            _forked(partial(_lane, Path(folder) / str(k), missing[k :: options.at_once], options.seed, kept))
            for k in range(options.at_once)
        ]
        for lane in lanes:
            os.waitpid(lane, 0)
    return {"seed": options.seed, "cases": kept.all(options.cases)}


def section(measured: dict[str, Any]) -> str:
    """By fault: how many launchers, how many were killed or left a pod, and how many pods were there at the end."""
    found = measured["cases"]
    rows = []
    for fault, harm in TROUBLES:
        some = [case for case in found if (case["fault"], case.get("harm")) == (fault, harm)]
        counts = [len(some), *(sum(bool(case[key]) for case in some) for key in ("killed", "left"))]
        counts += [sum(bool(case.get(key)) for case in some) for key in ("silent", "crashed", "robbed")]
        rows.append([harm or _named(fault), *map(str, (*counts, sum(len(case["leaked"]) for case in some)))])
    killed, left = sum(case["killed"] for case in found), sum(case["left"] for case in found)
    leaked = sum(len(case["leaked"]) for case in found)
    head = ["fault or harm", "launchers", "killed", "with a pod at the launcher's end", "silent", "crashed", "robbed",
            "pods after the next command"]  # fmt: skip
    states = ", ".join(f"{state} {n}" for state, n in _counted(c["state"] for c in found if c["killed"]).items())
    facts = [
        f"**{leaked} pods were left** in {len(found)} cases. {killed} launchers were killed; the next command, or the "
        f"pod itself, ended {left - leaked} pods that existed when their launcher was gone.",
        f"State of the killed launchers in the ledger: {states}.",
        *(f"*{harm}*: {what}." for harm, what in HARMS.items()),
    ]
    text = EXPLANATION.format(faults=len(FAULTS) - 1, harms=len(HARMS), alone=60 * ALONE_MINUTES)
    return f"{text}\n{table(head, rows)}\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _named(fault: dict[str, Any] | None) -> str:
    if fault is None:
        return "none"
    return f"`{fault['kind']}`" + "".join(f" {key}={value}" for key, value in fault.items() if key != "kind")


def _lane(folder: Path, numbers: list[int], seed: int, kept: cases.Kept) -> None:
    """Some of the cases, with an emulator of their own."""
    unshare()
    words = [sys.executable, "-m", "runner", "emulate", "--port", "0", "--root", str(folder / "runpod")]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:  # export RUNPOD_API_BASE_URL=…, export RUNPOD_API_KEY=…
            name, _, value = line.removeprefix("export ").strip().partition("=")
            os.environ[name] = value.strip("'\"")
            if name == "RUNPOD_API_KEY":
                break
        os.environ["RUNNER_CACHE"] = str(folder / "cache")
        spec = _prepared()
        for number in numbers:
            kept.add(_case(number, spec, folder / str(number), random.Random(f"{seed}-{number}")))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


def _prepared() -> Any:
    """Everything imported and composed once: children are forked from here."""
    import requests  # noqa: F401  # imported before the fork, for all lanes
    from runpod.api.rest import run_rest_request  # noqa: F401  # imported before the fork, for all lanes

    from runner.cli.options import request_of
    from runner.cloud import (
        rent_pod,  # noqa: F401  # imported before the fork, for all lanes
    )
    from runner.resolve.steps import resolved

    words = ("where=runpod", "hw=rtx4090", f"where.max_usd={CAP_USD}", "where.bad_host_minutes=0.01")
    return resolved(request_of((*words, "where.setup_minutes=0.2"), ()))[0]


def _case(number: int, spec: Any, folder: Path, chance: random.Random) -> dict[str, Any]:
    """One launcher, its end, and the next command's."""
    fault, kind = TROUBLES[number % len(TROUBLES)]
    folder.mkdir(parents=True)
    os.environ["RUNNER_STATE"] = str(folder / "state")
    delay = chance.uniform(0.0, LONGEST_S) if chance.random() < 0.5 else None
    harm = Harm(kind, folder / "state", chance.uniform(0.0, LONGEST_S - 0.5), chance)
    _ask("DELETE", "faults")
    if fault is not None:
        _ask("POST", "faults", fault)
    said, words = os.pipe()
    minutes = ALONE_MINUTES if kind is not None else None
    launcher = _forked(
        lambda: harm.inside(lambda: launchers.launch(spec, folder / "runs" / str(number), words, minutes))
    )
    os.close(words)
    killed = _meet(launcher, delay, harm, kind)
    with open(said, encoding="utf-8") as stream:
        told = stream.read()
    state, left = launchers.states(), len(_alive())
    _ask("DELETE", "faults")
    if fault is not None and fault["kind"] == "skew":  # a wrong clock stays wrong
        _ask("POST", "faults", fault)
    harm.mend()
    deadline = time.monotonic() + LEFT_S
    while (_alive() or not launchers.settled()) and time.monotonic() < deadline:
        _ended(_forked(launchers.next_command), 60.0)
    alive = _alive()
    for pod_id in alive:  # counted, and not left to the next case
        _ask("DELETE", f"../v2/pods/{pod_id}")
    harm.close()
    return {
        "case": number, "fault": fault, "harm": kind, "killed": killed, "state": state, "left": left, "leaked": alive,
        "silent": bool(left and not killed and LOUD not in told), "crashed": "Traceback" in told,
        "robbed": "ROBBED" in told, "said": told[-500:] if "Traceback" in told else "",
    }  # fmt: skip


def _meet(launcher: int, delay: float | None, harm: Harm, kind: str | None) -> bool:
    """What comes over a launcher, in order; whether it was killed. It is gone then."""
    began = time.monotonic()
    blows = [(harm.moment, "harm"), *([] if delay is None else [(delay, "kill")])]
    for moment, blow in sorted(blows):
        if _ended(launcher, max(0.0, began + moment - time.monotonic())):
            return False
        if blow == "kill":
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            return True
        harm.strike(lambda: _forked(lambda: launchers.listing(DAY_S if str(kind).endswith("ahead") else -DAY_S)))
    if not _ended(launcher, 90.0):
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    return False


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


def _forked(work: Callable[[], None]) -> int:
    """A child that does it and ends; its standard error is kept, for a case that goes wrong itself."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
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


BENCHMARK = Benchmark("chaos_cloud", add_options, measure, section, measures=("runner/cloud",))

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
