"""Does a pod end in time, with its result kept, whatever happens to its disk, its clock or its agent?"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.bench import Benchmark, alone, table
from benchmarks.harm import DAY_S
from runner.cloud.runpod import runpod_provider
from tests.cloud.test_agent import AGENT, KEY, Api, Pod
from tests.cloud.test_agent_disks import FAULTY, end
from tests.support.disks import Disk, unshare

CALLS = ("EDQUOT", "ENOSPC", "EROFS", "EIO", "ENOMEM", "EMFILE")
DAMAGES = (
    "none", "disk full", "disk nearly full", "disk read-only", "files garbled", "folder gone",
    *(f"{name} everywhere" for name in CALLS), "clock a day ahead", "clock a day behind", "agent hangs", "agent killed",
    "API answers 500", "API garbled",
)  # fmt: skip
LIMITS = ("deadline", "budget", "silence")
STAGES = {"armed": None, "training": "import time; time.sleep(100)", "done": "pass"}
LEFT_S = 9.0
WATCH_S = 1.0
PATIENCE_S = 45.0
CLOCK = """\
import os, sys, time
real, start, ahead, armed = time.time, {start}, {ahead}, {armed!r}
time.time = lambda: real() + (ahead if real() > start and os.path.exists(armed) else 0)
"""
RUN = """
import runpy
runpy.run_path({agent!r}, run_name="__main__")
"""

EXPLANATION = """\
In each case the real agent and the pod's real start command run as processes with a RunPod that is served over HTTP.
The pod has to end {left:.0f} s after its order: by the deadline, by the budget, or because the launcher is silent;
before, during or after a training, in the last case with a result that nobody has downloaded. At a random moment
before that, one of {damages} faults begins: a disk (ext4) that is full or read-only under open files; an error from
every call that opens, writes, locks, forks or kills; a clock of the agent that is a day off; SIGSTOP or SIGKILL for
the agent; errors from RunPod for {left:.0f} s. The start command acts {watch:.0f} s after the agent should have ended
the pod (30 s in real pods).

- *late*: longest time from the limit to the request that ended the pod;
- *early*: pods that were ended more than a tenth before their limit;
- *lost*: pods with a finished result that were terminated although they could have been stopped;
- *left*: pods that still existed {patience:.0f} s after their limit.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--cases`, `--seed`, `--at-once`."""
    cases.add_options(parser, 8 * len(DAMAGES), 6)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases."""
    unshare()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:

        def one(number: int) -> dict[str, Any]:
            return _case(number, Path(name) / str(number), random.Random(f"{options.seed}-{number}"))

        found = cases.Kept(BENCHMARK.name, options.seed).run(options.cases, options.at_once, one)
    return {"seed": options.seed, "cases": found}


def _case(number: int, folder: Path, chance: random.Random) -> dict[str, Any]:
    """One pod, and when it was ended."""
    damage = DAMAGES[number % len(DAMAGES)]
    limit, stage = chance.choice(LIMITS), chance.choice(list(STAGES))
    keeps, moment = chance.random() < 0.5, chance.uniform(0.5, LEFT_S - 3)
    disk = Disk(folder) if damage.startswith("disk") else None
    api = Api()
    pod = Pod(folder, api)
    began = time.time()
    due = began + LEFT_S
    _agent(pod, damage, began + moment)
    order: dict[str, Any] = {"uncollected": "stop" if keeps else "terminate", "deadline": began + 600}
    order |= {
        "deadline": {"deadline": due},
        "budget": {"budget_usd": LEFT_S / 3600},
        "silence": {"heartbeat_minutes": LEFT_S / 60},
    }[limit]
    pod.order(**order)
    if code := STAGES[stage]:
        pod.task(code)
    env = {"RUNPOD_POD_ID": pod.id, "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": api.url}
    start = subprocess.Popen(
        runpod_provider.start_arguments(pod.run_id, LEFT_S / 60, "/bin/cat"),
        stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, **env, "RUNNER_WORKSPACE": str(folder / "workspace")}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(max(0.0, began + moment - time.time()))
        status = pod.status()
        _strike(damage, pod, disk, status.get("agent"), chance)
        while not _ended(api) and time.time() < due + PATIENCE_S:
            time.sleep(0.05)
        ended = time.time()
    finally:
        os.killpg(start.pid, signal.SIGKILL)
        start.wait()
        end(status.get("agent") or 1 << 22, pod.run_id)
        api.server.shutdown()
        if disk is not None:
            disk.close()
    how = "stop" if api.ended("stop") else "DELETE" if api.ended() else None
    kept = keeps and status.get("state") == "done" and damage != "folder gone"
    return {
        "case": number, "damage": damage, "limit": limit, "stage": stage, "moment": round(moment, 2), "how": how,
        "seen": status.get("state"), "late": round(ended - due, 2) if how else None,
        "early": bool(how) and ended < due - LEFT_S / 10 - 1, "lost": kept and how == "DELETE", "left": how is None,
    }  # fmt: skip


def _ended(api: Any) -> bool:
    """A request that ends the pod was answered well."""
    return any(api.ended(how) and api.answers[how] < 300 for how in ("DELETE", "stop"))


def _agent(pod: Any, damage: str, start: float) -> None:
    """The pod's agent.py: gives the start command a second, and has its calls or its clock harmed from `start` on."""
    text = AGENT.read_text("utf-8")
    assert "WATCH_SECONDS = 30.0" in text
    real = pod.folder.parent / "real_agent.py"
    real.write_text(text.replace("WATCH_SECONDS = 30.0", f"WATCH_SECONDS = {WATCH_S}"), "utf-8")
    prelude = ""
    if damage.endswith("everywhere"):
        prelude = f"import os; os.environ.update(FAULT={damage.split()[0]!r}, FAULT_FROM='{start}')\n"
        prelude += FAULTY.partition("sys.argv = sys.argv[1:]")[0]
    elif damage.startswith("clock"):
        prelude = CLOCK.format(
            start=start, ahead=DAY_S if damage.endswith("ahead") else -DAY_S, armed=str(pod.folder / "armed.json")
        )
    (pod.folder / "agent.py").write_text(prelude + RUN.format(agent=str(real)), "utf-8")


def _strike(damage: str, pod: Any, disk: Disk | None, agent: int | None, chance: random.Random) -> None:
    if disk is not None and damage == "disk read-only":
        disk.break_down()
    elif disk is not None:
        disk.fill(chance.randrange(1, 16) * 4096 if damage == "disk nearly full" else 0)
    elif damage == "files garbled":
        for file in pod.folder.glob("*.json"):
            file.write_bytes(chance.randbytes(256))
    elif damage == "folder gone":
        subprocess.run(["rm", "-rf", str(pod.folder)], check=True)
    elif damage in ("agent hangs", "agent killed") and agent:
        os.kill(agent, signal.SIGSTOP if damage == "agent hangs" else signal.SIGKILL)
    elif damage == "API answers 500":
        pod.api.answers |= {"DELETE": 500, "stop": 500}
        time.sleep(LEFT_S)
        pod.api.asked.clear()
        pod.api.answers |= {"DELETE": 204, "stop": 200}
    elif damage == "API garbled":
        pod.api.answers |= {"DELETE": 99999, "stop": 99999}
        time.sleep(LEFT_S)
        pod.api.asked.clear()
        pod.api.answers |= {"DELETE": 204, "stop": 200}


def section(measured: dict[str, Any]) -> str:
    """By damage: pods, how late, and what must be zero."""
    found = measured["cases"]
    rows = []
    for damage in [*DAMAGES, "all"]:
        some = [case for case in found if damage in ("all", case["damage"])]
        late = [case["late"] for case in some if case["late"] is not None]
        stages = [sum(case["stage"] == stage for case in some) for stage in STAGES]
        counts = [sum(bool(case[key]) for case in some) for key in ("early", "lost", "left")]
        shown = f"{max(0.0, *late):.1f}" if late else "–"
        rows.append([damage if damage != "all" else "**all**", *map(str, (len(some), *stages)), shown,
                     *map(str, counts)])  # fmt: skip
    head = ["what goes wrong", "pods", *STAGES, "late, s", "early", "lost", "left"]
    text = EXPLANATION.format(left=LEFT_S, damages=len(DAMAGES) - 1, watch=WATCH_S, patience=PATIENCE_S)
    return f"{text}\n{table(head, rows)}"


BENCHMARK = Benchmark("chaos_agents", add_options, measure, section, measures=("runner/cloud/agent",))

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
