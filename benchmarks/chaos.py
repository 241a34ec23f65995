"""Kill a run at random moments, resume it, and compare its end with that of a run nobody touched."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, say, table
from runner.launcher.supervisor import rank_reports
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from tests.support.processes import tiny_model, words

EXPLANATION = """\
A tiny Llama is trained with LoRA for {steps} steps and evaluated every {evaluated}, in three variants: one process
and two processes under DeepSpeed ZeRO-2 with a checkpoint every {every} steps, and one process with checkpoints by
time that also answers prompts. At a random moment, in half of the cases the next one of an evaluation or a save, a
rank, the launcher or all processes get SIGKILL, the command gets SIGTERM, the disk (a small tmpfs) is full, or a file
of the newest checkpoint is truncated or changed after a kill. `python -m runner resume` continues, until the next
interruption. After {hits} interruptions the run is left undisturbed. Required are:

- a successful resume after each interruption;
- complete JSON files and checkpoints; checkpoints that were damaged on purpose must be detected and skipped;
- the losses of all steps and the final weights of an undisturbed run, bit for bit.
"""
STEPS, EVERY, EVALUATED, HITS = 80, 5, 20, 5
BY_STEPS = f"train.save_every_steps={EVERY}"
VARIANTS = {
    "one process": ("hw.num_cpus=1", BY_STEPS),
    "two processes, ZeRO-2": ("hw.num_processes=2", "deepspeed=zero2", BY_STEPS),
    "one process, by the clock": ("hw.num_cpus=1", "train.save_every_minutes=0.05", "eval.num_prompts=16"),
}
WEIGHTS = "model/adapter_model.safetensors"
ACTIONS = ("a rank", "the launcher", "the front", "all", "SIGTERM", "cut short", "changed", "disk full")
SHORT = ("evaluating", "saving")
"""Phases that a random moment seldom falls into: half of the hits wait for one of them."""
SMALL_DISKS, LARGE_DISK = ("1m", "2m", "3m"), "200m"


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--hits`, `--seed`."""
    parser.add_argument("--hits", type=int, default=60, help="hits in all (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments (default 1)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every hit, and how every run ended."""
    dice = random.Random(options.seed)
    hits: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model")
        expected = {name: _undisturbed(model, Path(folder) / f"reference-{i}", name) for i, name in enumerate(VARIANTS)}
        while sum(not hit["ended by itself"] for hit in hits) < options.hits:
            variant = list(VARIANTS)[len(runs) % len(VARIANTS)]
            out = Path(folder) / f"run-{len(runs)}"
            known = len(hits)
            ending = _one_run(model, out, variant, expected[variant], dice, hits)
            runs.append({"variant": variant, "hits": len(hits) - known, **ending})
            say(f"chaos: {len(hits)} of {options.hits} hits; run {len(runs)}: {ending}")
            shutil.rmtree(out, ignore_errors=True)
    seconds = {name: reference["seconds"] for name, reference in expected.items()}
    return {"seed": options.seed, "undisturbed_seconds": seconds, "hits": hits, "runs": runs}


def _words(model: Path, out: Path, variant: str) -> list[str]:
    return words(model, out, f"train.max_steps={STEPS}", f"eval.every_steps={EVALUATED}", *VARIANTS[variant])


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "runner", *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _undisturbed(model: Path, out: Path, variant: str) -> dict[str, Any]:
    began = time.monotonic()
    process = _start(_words(model, out, variant))
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode(errors="replace"))
    run = _run_in(out)
    assert run is not None
    seconds = round(time.monotonic() - began, 1)
    say(f"chaos: {variant} undisturbed: {seconds} s")
    return {"seconds": seconds, "losses": _losses(run), "weights": (run.path / WEIGHTS).read_bytes()}


def _one_run(
    model: Path, out: Path, variant: str, expected: dict[str, Any], dice: random.Random, hits: list[dict[str, Any]]
) -> dict[str, Any]:
    """A run, hit `HITS` times, then left alone; how it ended."""
    out.mkdir()
    spoilt: set[int] = set()
    disk_full = dice.random() < 0.5
    with _disk(out, dice.choice(SMALL_DISKS) if disk_full else LARGE_DISK) as resize:
        for number in range(HITS):
            action = "disk full" if disk_full and number == 0 else dice.choice(ACTIONS[:-1])
            run = _run_in(out)
            process = _start(["resume", str(run.path)] if run else _words(model, out, variant))
            hit = _hit(process, out, action, dice, expected["seconds"])
            if action == "disk full":
                resize(LARGE_DISK)
            run = _run_in(out)
            spoilt |= {hit["damaged"]} if hit.get("damaged") else set()
            found: dict[str, Any] = _checked(run, spoilt) if run else {"checkpoint": None, "whole": True}
            spoilt &= set(found.pop("bad", ()))  # what was written anew must be whole from then on
            if run:  # what was done between the look and the blow counts too
                done = [step for step, _ in _losses(run)[-1:]]
                hit["step"] = max(hit["step"], *done, found["checkpoint"] if not hit.get("damaged") else 0)
            hits.append({"variant": variant, **hit, **found})
            if hit["ended by itself"]:  # done before the moment had come
                break
        run = _run_in(out)
        if run is None or run.read("status.json").get("state") != "done":
            process = _start(["resume", str(run.path)] if run else _words(model, out, variant))
            _, errors = process.communicate()
            if process.returncode:
                return {"resumed": False, "equal": False, "error": errors.decode(errors="replace")[-600:]}
        run = _run_in(out)
        assert run is not None
        equal = _losses(run) == expected["losses"] and (run.path / WEIGHTS).read_bytes() == expected["weights"]
        return {"resumed": True, "equal": equal}


def _hit(
    process: subprocess.Popen[bytes], out: Path, action: str, dice: random.Random, seconds: float
) -> dict[str, Any]:
    """Wait for a random moment of the run, do it, wait until every process is gone."""
    if action == "disk full":
        process.communicate()
        return _moment(out, action, by_itself=process.returncode == 0)
    # A third of a run is Python starting: most hits come later.
    end = time.monotonic() + dice.uniform(0.05 if dice.random() < 0.2 else 0.35, 1.0) * seconds
    phase = dice.choice((None, None, *SHORT))
    while process.poll() is None:
        left = end - time.monotonic()
        if left <= (0.4 * seconds if phase else 0) and phase in (None, _moment(out, action, by_itself=False)["phase"]):
            break
        time.sleep(0.005)
    by_itself = process.poll() is not None
    moment = _moment(out, action, by_itself=by_itself)
    family = _family(process.pid)
    if not by_itself:
        _strike(process, family, _run_in(out), action, dice)
    while any(_there(pid) for pid in family):
        time.sleep(0.05)
    process.communicate()
    run = _run_in(out)
    if run is not None and action in ("cut short", "changed") and not by_itself:
        moment["damaged"] = _damage(run, action, dice)
    return moment


def _strike(
    process: subprocess.Popen[bytes], family: list[int], run: RunDir | None, action: str, dice: random.Random
) -> None:
    ranks = [sign["pid"] for sign in rank_reports(run) if sign["state"] == "alive"] if run else []
    if action == "SIGTERM":
        victims, number = [process.pid], signal.SIGTERM
    elif action == "a rank":
        victims, number = [dice.choice(ranks)] if ranks else family[-1:], signal.SIGKILL
    elif action == "the launcher":
        victims, number = family[1:2] or family[:1], signal.SIGKILL
    elif action == "the front":
        victims, number = [process.pid], signal.SIGKILL
    else:
        victims, number = family, signal.SIGKILL
    for pid in victims:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _family(pid: int) -> list[int]:
    """The process and all its descendants, parents first."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def _there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _moment(out: Path, action: str, *, by_itself: bool) -> dict[str, Any]:
    run = _run_in(out)
    found = rank_reports(run) if run else []
    phase = found[0].get("phase", "starting") if found else "starting"
    step = max((sign.get("step") or 0 for sign in found), default=0)
    return {"action": action, "phase": phase, "step": step, "ended by itself": by_itself}


def _damage(run: RunDir, action: str, dice: random.Random) -> int | None:
    """Spoil a file of the newest complete checkpoint; its step."""
    done = checkpoints.complete(run)
    if not done:
        return None
    files = [file for file in checkpoints.folder(run, done[-1]).rglob("*") if file.is_file() and file.stat().st_size]
    victim = dice.choice(sorted(files))
    content = bytearray(victim.read_bytes())
    place = dice.randrange(len(content))
    if action == "cut short":
        content = content[:place]
    else:
        content[place] ^= 0xFF
    victim.write_bytes(content)
    return done[-1]


def _checked(run: RunDir, spoilt: set[int]) -> dict[str, Any]:
    """The newest checkpoint to go on from, and whether all that calls itself whole is whole, but for what was spoilt.

    A checkpoint that this or an earlier hit has damaged is there until a resume has come as far as to write it anew.
    """
    whole = True
    for file in run.path.rglob("*.json"):
        if "checkpoint-" in str(file) or ".tmp" in str(file):
            continue
        try:
            json.loads(file.read_text("utf-8"))
        except ValueError:
            whole = False
    done = checkpoints.complete(run)
    bad = [step for step in done if checkpoints.damage(checkpoints.folder(run, step))]
    good = [step for step in done if step not in bad]
    return {"checkpoint": max(good, default=0), "whole": whole and set(bad) <= spoilt, "bad": bad}


def _run_in(out: Path) -> RunDir | None:
    found = [file.parent for file in out.glob("*/status.json")]
    return RunDir(found[0]) if found else None


def _losses(run: RunDir) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in run.metrics()]


@contextmanager
def _disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs of that size in `folder`; yields what changes its size. Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def resize(new: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={new}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def section(measured: dict[str, Any]) -> str:
    """What was hit when, and how the runs ended."""
    hits, runs = measured["hits"], measured["runs"]
    struck = [hit for hit in hits if not hit["ended by itself"]]
    phases = ["starting", "loading", "evaluating", "training", "saving"]
    counts = Counter((hit["action"], hit["phase"]) for hit in struck)
    actions = [action for action in ACTIONS if any(hit["action"] == action for hit in struck)]
    rows = [
        [
            action,
            *(str(counts[action, phase] or "") for phase in phases),
            str(sum(h["action"] == action for h in struck)),
        ]
        for action in actions
    ]
    lost = [hit["step"] - hit["checkpoint"] for hit in struck if hit["checkpoint"] is not None and hit["step"]]
    facts = [
        f"{len(struck)} interruptions in {len(runs)} runs; every resume succeeded in "
        f"{sum(run['resumed'] for run in runs)} of {len(runs)}.",
        f"Files complete after {sum(hit['whole'] for hit in struck)} of {len(struck)} interruptions.",
        f"Losses and weights equal to the undisturbed run's, bit for bit: {sum(run['equal'] for run in runs)} of "
        f"{len(runs)} runs.",
        f"Steps repeated after an interruption: {sum(lost) / max(1, len(lost)):.1f} on average, "
        f"{max(lost, default=0)} at most (a checkpoint every {EVERY} steps, or by time; one damaged on purpose costs "
        "as many again).",
    ]
    head = ["interrupted", *(f"while {phase}" for phase in phases), "total"]
    text = EXPLANATION.format(steps=STEPS, every=EVERY, evaluated=EVALUATED, hits=HITS)
    return f"{text}\n{table(head, rows)}\n\n" + "\n".join(f"- {fact}" for fact in facts)


BENCHMARK = Benchmark(
    "chaos", add_options, measure, section, measures=("runner/train", "runner/launcher", "runner/rundir")
)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
