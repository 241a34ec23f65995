"""Whole runs in pods, launchers killed, pods taken away, caps reached: what is left, what lost, what overspent?"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import cases, hostile
from benchmarks.bench import ROOT, Benchmark, alone, table
from benchmarks.pod_training import EVALUATED, MODEL, STEP_S, SUM
from runner.cloud.ledger import Ledger
from runner.emulator.server import Emulator
from runner.rundir.directory import RunDir
from tests.support.disks import Disk, unshare
from tests.support.processes import only_run, tiny_model, words

STEPS = 80
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
FRONT = re.compile(r'^  File ".*/runner/cli/\w+\.py", line \d+', re.MULTILINE)
"""A frame of a command line's stack trace."""
CAP_LEFT_S = 110.0
"""So long before its cap a run of the second kind begins. The launcher ends a training 90 s before the end."""
SILENCE_S = 15.0
ROUNDS = 3
"""A pod that was taken away in the middle of its training goes on with it when `fetch` starts it again."""
NEAR_CAP = 2
"""Every so many-th run begins near its cap: the even faults in one round, the odd ones in the next."""
GRACE_S = 12.0
"""So long before its cap at most a pod of these ends itself (a tenth of what is left for a checkpoint), and half a
second."""
LAUNCHER = """\
import sys
from runner.cloud import budget, rent_pod
from runner.cloud.budget import Meter
left = float(sys.argv.pop(1))

def near(usd, began, disk=0.0, cap=None, spent=0.0):
    meter = Meter(usd, began, disk, cap, spent)
    if left and cap is not None:
        meter.started -= meter.ends() - began - left
    return meter

rent_pod.Meter = budget.Meter = near
from runner.cli.main import main
main()
"""
FAULTS: tuple[tuple[str, dict[str, Any]] | None, ...] = (
    None,
    ("restart", {}),
    ("preempt", {"warning": True}),
    ("preempt", {"warning": False}),
    ("vanish", {}),
    ("lost", {"on": "create"}),
    ("answer", {"on": "reads", "status": 502, "times": 5}),
    ("answer", {"on": "terminate", "status": 500, "times": 3}),
    ("undead", {}),
    ("late_listing", {"seconds": 3}),
    ("double", {"on": "create"}),
    ("answer", {"on": "list", "status": 500, "times": 0}),
    ("answer", {"on": "terminate", "status": 502, "times": 8}),
    ("pod disk full", {}),
    ("pod disk read-only", {}),
    ("own disk full", {}),
    ("own disk read-only", {}),
    ("own ledger deleted", {}),
)
"""What happens, once, at a random moment: to a pod, to the next requests, to the disks of pods or of the launcher."""
EACH = 7
HOSTILE_CASES = 4 * len(hostile.WAYS)
"""After the cases of the other faults, each way several times, mostly beside others."""
TAKEN = ("vanish",)
"""Faults that take the disk away, with what only it had."""

EXPLANATION = """\
Each case is a whole `python -m runner … where=runpod` with an [emulated RunPod](emulator.md) of its own: real ssh
servers, rsync and the real agent. Instead of the training, a process of {seconds:.0f} s reads and writes the same
files and handles the same signals (benchmarks/pod_training.py). At a random moment one of {faults} faults begins, or
none. Disks are real ones (ext4). Half of the launchers get SIGKILL at another moment, and a quarter of the runs is
detached. Every second run starts {left:.0f} s before its budget is spent and would train forever. After all pods have
ended, disks are repaired and `fetch` and `pods reap` are typed.

In {hostile} further cases the pod is hostile from a random moment on, in one to three of {ways} ways: links and hard
links; devices and pipes; names with newlines and `..`; helper scripts that write elsewhere or never stop; terminal
control sequences and malformed JSON; sparse files of 8 TiB and thousands of small ones. Its results are not counted,
and if `fetch` refuses to download, the pod is ended with the command that `fetch` names. – means not counted.

- *lost*: finished models on a disk that was not taken away which were not downloaded bit for bit;
- *cap reached*: runs that were ended by their budget;
- *past the cap*: longest time for which a pod was paid for after its budget was spent;
- *left*: pods that exist at the end;
- *outside*: bytes written on the launcher's machine outside the run directory, the state and the cache;
- *not plain*: links, devices and pipes in the run directory;
- *escapes*: terminal control characters in a launcher's output;
- *crashed*: commands that ended with a stack trace.
"""


@dataclass
class Watch:
    """What is paid for, looked at five times a second."""

    emulator: Emulator
    seen: dict[str, float] = field(default_factory=dict)
    """Pod → when it was last seen to be paid for by the hour."""
    finished: str | None = None
    """The sum of the model that a training in some pod has finished."""
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.2):
            self.seen.update(dict.fromkeys(self.paid(), time.time()))
            for file in self.emulator.world.root.glob(f"pods/*/volume/runs/*/{SUM}"):
                with suppress(OSError):
                    self.finished = file.read_text("utf-8")

    def paid(self) -> list[str]:
        """Pods that run, or begin to."""
        return [id for id, pod in self.emulator.pods().items() if pod.status not in ("EXITED", "TERMINATED")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--cases`, `--seed`, `--at-once`."""
    cases.add_options(parser, EACH * len(FAULTS) + HOSTILE_CASES, 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases."""
    unshare()
    visible = ROOT / ".pytest_cache"  # from inside of a pod, which has a /tmp and a /root of its own
    visible.mkdir(exist_ok=True)
    python = pods_python(visible / "pods-python")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        model = tiny_model(folder / "model")

        def one(number: int) -> dict[str, Any]:
            return _case(number, folder / str(number), model, python, random.Random(f"{options.seed}-{number}"))

        found = cases.Kept(BENCHMARK.name, options.seed).run(options.cases, options.at_once, one)
    return {"seed": options.seed, "cases": found}


def _case(number: int, folder: Path, model: Path, python: Path, dice: random.Random) -> dict[str, Any]:
    """One run, its end, and what is left of it."""
    fault = FAULTS[number % len(FAULTS)]
    ways = list(hostile.WAYS)
    if number >= EACH * len(FAULTS):
        fault = (f"hostile pod: {ways[number % len(ways)]}", {})
        ways = [ways[number % len(ways)], *dice.sample(ways, dice.randrange(3))]
    near_cap = (number + number // len(FAULTS)) % NEAR_CAP == 0
    detached = dice.random() < 0.25
    longest = 35.0 if near_cap else 13.0 + (STEPS + 2 * EVALUATED) * STEP_S
    kill_at = dice.uniform(0, longest) if dice.random() < (0.25 if near_cap else 0.5) else None
    at_create = fault is not None and fault[1].get("on") == "create"
    strike_at = dice.uniform(0, longest) if not at_create else 0.0
    folder.mkdir()
    kind = fault[0] if fault is not None else ""
    own = folder / "own"
    disk = _disk(kind, folder)
    elsewhere, outside, temporary = (folder / name for name in ("home", "outside", "tmp"))
    for place in (own, elsewhere, outside, temporary):
        place.mkdir(exist_ok=True)
    (outside / "secret").write_text("owner's")
    with Emulator(folder / "runpod") as emulator, Watch(emulator) as watch:
        env = {
            **os.environ, **emulator.env, "RUNNER_STATE": str(own / "state"), "RUNNER_CACHE": str(own / "cache"),
            "RUNNER_POD_PYTHON": str(python), "RUNNER_CLOUD_PACE": "0.1", "PYTHONPATH": str(ROOT), "COLUMNS": "200",
            "HOME": str(elsewhere), "TMPDIR": str(temporary),
        }  # fmt: skip
        steps = 100_000 if near_cap else STEPS
        typed = words(
            model, own / "runs", "where=runpod", "where.gpu_types=[NVIDIA L4]", f"train.max_steps={steps}",
            "where.max_usd=5", "where.deadline_hours=24", "where.bad_host_minutes=0.2", "where.setup_minutes=0.75",
            f"where.heartbeat_minutes={SILENCE_S / 60}",
        )  # fmt: skip
        command = [sys.executable, "-c", LAUNCHER, str(CAP_LEFT_S if near_cap else 0.0), *typed, "--yes"]
        with (folder / "launcher.log").open("w") as log:
            launcher = subprocess.Popen(
                [*command, *["--detach"] * detached],
                env=env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        taken, phases = _strike(
            watch, fault, strike_at, launcher, kill_at, own, disk, lambda: _turn(emulator, outside, ways, dice)
        )
        killed = launcher.returncode == -signal.SIGKILL
        quiet = _until(lambda: launcher.poll() is not None and not watch.paid(), CAP_LEFT_S + 120)
        if launcher.poll() is None:
            launcher.kill()
        emulator.clear()
        if disk is not None:
            disk.mend()
        past = _past_cap(own / "state", watch.seen) if near_cap else None
        stopped = "where.max_usd" in _read(folder / "launcher.log").partition("Stops the training: ")[2]
        run = only_run(own / "runs")
        for _ in range(ROUNDS):
            if run is None or not emulator.pods():
                break
            _typed(env, folder / "after.log", "fetch", run.name, "--output-dir", str(run.parent))
            _until(lambda: not watch.paid(), CAP_LEFT_S)
        if run is not None and fault is not None and fault[0].startswith("hostile") and emulator.pods():
            _typed(env, folder / "after.log", "pods", "terminate", run.name)  # as `fetch` says
        _typed(env, folder / "after.log", "pods", "reap")
        left = [id for id, pod in emulator.pods().items() if pod.status != "TERMINATED"]
    home, state = _home(run, watch.finished), _state(run)
    sockets = temporary.glob("runner-*")  # of ssh, and lists of files: what a launcher that gets SIGKILL leaves
    ours = (*sockets, own / "state", own / "cache", own / "runs", own / "lost+found", *([run] if run else []))
    runs = [own / "runs"] * (run is not None)  # else it was killed while it made its directory
    stray = hostile.written(elsewhere, outside, temporary, own, *runs, but=ours) - len("owner's")
    said = "".join(map(_read, folder.glob("*.log")))
    found = {
        "case": number, "fault": None if fault is None else " ".join([fault[0], *map(str, fault[1].values())]),
        "near_cap": near_cap, "detached": detached, "killed": killed, "quiet": quiet, "left": left,
        "finished": watch.finished is not None, "home": home, "taken": taken,
        "cap_reached": None if past is None else "launcher" if stopped else "pod" if past > -GRACE_S else None,
        "past_cap_seconds": None if past is None else max(0.0, past), "state": state, "outside": stray, **phases,
        "not_plain": hostile.not_plain(run) if run else 0, "escapes": len(CONTROL.findall(said)),
        "crashes": crashes(said),
    }  # fmt: skip
    if _wrong(found):
        kept = cases.FOLDER / "failed" / folder.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--sparse=always", str(folder), str(kept)], check=False, capture_output=True)
    if disk is not None:
        disk.close()
    return found


def _lost(case: dict[str, Any]) -> bool:
    """A model that a training had finished, on a disk that was not taken away, is not here."""
    return case["finished"] and not case["home"] and not case["taken"]


def _wrong(case: dict[str, Any]) -> bool:
    """Whether the case's folder is worth keeping."""
    bad = ("left", "past_cap_seconds", "outside", "not_plain", "escapes", "crashes")
    return _lost(case) or not case["quiet"] or any(case[key] for key in bad)


def crashes(said: str) -> int:
    """How many stack traces of a command line there are in what commands have said; those of a pod's processes that a
    launcher repeats are none."""
    traces = re.split(r"^Traceback \(most recent call last\):$", said, flags=re.MULTILINE)[1:]
    return sum(bool(FRONT.search(trace)) for trace in traces)


def _read(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


PHASES = ("renting", "sending", "installing", "loading", "evaluating", "training", "saving", "collecting", "over")
WHILE = {"armed": "sending", "installing": "installing", "ending": "over"}
"""Phase by the agent's state, where its training does not say more."""


def _phase(watch: Watch, launcher: subprocess.Popen[bytes]) -> str:
    """Where a run is, as the newest pod with its folder says."""
    if launcher.poll() is not None and not watch.paid():
        return "over"
    files = list(watch.emulator.world.root.glob("pods/*/volume/runs/*/agent-status.json"))
    if not files:
        return "sending" if watch.paid() else "renting"
    run = RunDir(max(files, key=lambda file: file.stat().st_mtime).parent)
    state = run.read("agent-status.json").get("state")
    if state == "training":
        told = run.status.get("state")
        return str(told) if told in PHASES else "loading" if told == "created" else "saving"
    return WHILE.get(str(state), "collecting")


def _disk(kind: str, folder: Path) -> Disk | None:
    """The one that is to be harmed: of all pods, or of the launcher."""
    place = {"pod disk": "runpod", "own disk": "own"}.get(kind[:8])
    return None if place is None else Disk(folder / place, 96)


def _turn(emulator: Emulator, outside: Path, ways: list[str], dice: random.Random) -> None:
    """Let the run's folder in every pod be an enemy's, as soon as there is one."""
    _until(lambda: any(emulator.world.root.glob("pods/*/volume/runs/*/agent.json")), 15)
    for place in emulator.world.root.glob("pods/*/volume/runs/*"):
        hostile.turn(place, outside, ways, dice)


def _harm(kind: str, own: Path, disk: Disk | None) -> None:
    if disk is not None:
        disk.fill() if kind.endswith("full") else disk.break_down()
        return
    for part in (own / "state").glob("ledger.db*"):
        part.unlink(missing_ok=True)


def pods_python(file: Path) -> Path:
    """A Python for pods whose training is the stand-in."""
    file.write_text(
        '#!/bin/sh\ncase "$*" in "-m runner.launcher.on_pod "*) shift 2; '
        f'PYTHONPATH="{ROOT}" exec {sys.executable} -m benchmarks.pod_training "$@";; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    file.chmod(0o755)
    return file


def _strike(
    watch: Watch, fault: tuple[str, dict[str, Any]] | None, strike_at: float, launcher: subprocess.Popen[bytes],
    kill_at: float | None, own: Path, disk: Disk | None, turn: Callable[[], None],
) -> tuple[bool, dict[str, str]]:  # fmt: skip
    """Both blows at their moments; whether a finished model was taken away with its disk, and in which phases of the
    run they hit (`strike_phase`, `kill_phase`)."""
    if strike_at:  # moments count from the first request on: a slow machine has not asked for a pod before
        _until(lambda: watch.emulator.exchanges or launcher.poll() is not None, 120)
    began, taken, phases = time.monotonic(), False, {}
    blows = ([] if kill_at is None else [(kill_at, "kill")]) + [(strike_at, "strike")] * (fault is not None)
    for moment, blow in sorted(blows):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        phases[f"{blow}_phase"] = _phase(watch, launcher)
        if blow == "kill":
            launcher.kill()
            launcher.wait()
        elif fault is not None and fault[0].startswith("hostile"):
            turn()
            taken = True  # what such a pod says it has trained is nothing
        elif fault is not None and fault[0].startswith(("pod ", "own ")):
            _harm(fault[0], own, disk)
        elif fault is not None:
            taken = fault[0] in TAKEN and watch.finished is not None
            watch.emulator.inject(fault[0], **fault[1])
    return taken, phases


def _typed(env: dict[str, str], log: Path, *verb: str) -> None:
    with log.open("a") as words, suppress(subprocess.TimeoutExpired):
        command = [sys.executable, "-m", "runner", *verb]
        subprocess.run(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=words, stderr=words, timeout=300)


def _past_cap(state: Path, seen: dict[str, float]) -> float:
    """Seconds for which a pod was paid for after its cap, or negative before it: the deadline in the ledger is the
    cap's here."""
    entries = Ledger.or_copy(state / "ledger.db")[0].entries(gone=True)
    over = [seen[e.pod_id] - e.deadline for e in entries if e.pod_id in seen and e.deadline is not None]
    return round(max(over, default=-CAP_LEFT_S), 1)


def _home(run: Path | None, expected: str | None) -> bool:
    """Whether the finished model is here, bit for bit."""
    file = run / MODEL if run else None
    return bool(file and file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == expected)


def _state(run: Path | None) -> str | None:
    return RunDir(run).state() if run else None


def _until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def section(measured: dict[str, Any]) -> str:
    """By fault: runs, killed launchers, and what must be zero."""
    rows, found = [], measured["cases"]
    for fault in [*dict.fromkeys(case["fault"] for case in found), "all"]:
        some = [case for case in found if fault in ("all", case["fault"])]
        past = [case["past_cap_seconds"] for case in some if case["past_cap_seconds"] is not None]
        reached = [case for case in some if case.get("cap_reached")]
        rows.append([
            "none" if fault is None else f"`{fault}`" if fault != "all" else "**all**", str(len(some)),
            str(sum(case["killed"] for case in some)), str(sum(case["detached"] for case in some)),
            str(sum(case["finished"] for case in some)), str(sum(map(_lost, some))), str(len(reached)),
            f"{max(past):.1f}" if past else "–", str(sum(len(case["left"]) for case in some)),
            *(_sum(some, key) for key in ("outside", "not_plain", "escapes", "crashes")),
        ])  # fmt: skip
    enemies = sum(str(case["fault"]).startswith("hostile") for case in found)
    head = ["fault", "runs", "killed", "detached", "trained to the end", "lost", "cap reached", "past the cap, s",
            "left", "outside", "not plain", "escapes", "crashed"]  # fmt: skip
    text = EXPLANATION.format(seconds=(STEPS + 2 * EVALUATED) * STEP_S, faults=len(FAULTS) - 1, left=CAP_LEFT_S,
                              hostile=enemies, ways=len(hostile.WAYS))  # fmt: skip
    old = sum("crashes" not in case for case in found)
    uncounted = [f"Stack traces were not counted in the {old} cases, which are older than that column."] * bool(old)
    kinds = {case["fault"]: [c["finished"] for c in found if c["fault"] == case["fault"]] for case in found}
    idle = {f"`{kind}`" if kind else "no fault": len(finished) for kind, finished in kinds.items() if not any(finished)}
    nothing = [f"No training finished in the {sum(idle.values())} cases of {', '.join(idle)}, so they do not show that "
               "a finished model is kept."] * bool(idle)  # fmt: skip
    by = [[case.get("cap_reached") for case in found].count(who) for who in ("launcher", "pod")]
    facts = [
        f"{sum(case['near_cap'] for case in found)} runs began near their cap, and **{sum(by)} reached it**: {by[0]} "
        f"were ended by their launcher, after the training had saved a checkpoint, {by[1]} by their pod. The others "
        "ended earlier, by the fault or because their launcher had been killed.",
        _hits(found),
        *nothing,
        *uncounted,
        *(
            f"Past its cap: {case['past_cap_seconds']} s, case {case['case']}, `{case['fault']}`"
            f"{f', its launcher killed while {phase}' if (phase := case.get('kill_phase')) else ''}."
            for case in found
            if case["past_cap_seconds"]
        ),
    ]
    return f"{text}\n{table(head, rows)}\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _hits(found: list[dict[str, Any]]) -> str:
    """In which phases of the runs the faults and kills came."""
    hits = [phase for case in found for key in ("strike_phase", "kill_phase") if (phase := case.get(key))]
    counts = ", ".join(f"{phase} {hits.count(phase)}" for phase in PHASES if phase in hits)
    return f"When the {len(hits)} faults and kills came, the runs were at: {counts}."


def _sum(some: list[dict[str, Any]], key: str) -> str:
    """Of the cases in which it was counted."""
    found = [case[key] for case in some if key in case]
    return str(sum(found)) if found else "–"


BENCHMARK = Benchmark("chaos_pods", add_options, measure, section, measures=("runner/cloud",))

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
