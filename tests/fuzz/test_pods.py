"""A pod's lines, files, specs and a provider's answers: data of a stranger's machine."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from runner.cloud import adopted_spec, fleet
from runner.cloud.follow import Display, Follower
from runner.cloud.runpod import json_types
from runner.config import json_text
from runner.report.run_list import print_runs, run_rows
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from tests.conftest import spec_of
from tests.fuzz import mutate
from tests.fuzz.fuzzing import Target, fuzz

METRICS = {
    "step": 3,
    "loss": 1.5,
    "learning_rate": 1e-4,
    "tokens_per_second": 100.0,
    "time": 1.0,
    "epoch": 0.1,
    "grad_norm": 1.0,
}
STATUS = {
    "run_id": "r", "state": "running", "pid": 1, "host": "h", "born": "b:1", "updated": 1.0, "created": 0.5, "started": 0.6,
    "spent": 2.0, "num_steps": 10, "step": 3, "model": "m", "method": "lora", "objective": "sft", "data": "d", "learning_rate": 1e-4,
    "error": None, "exit_code": None,
}  # fmt: skip
SUMMARY = {
    "run_id": "r", "state": "done", "train": {"loss_first": 1.0, "loss_last": 0.5, "steps": 3},
    "eval": {"num_prompts": 1, "before": {}, "after": {"exact_match": 0.5}}, "seconds": 3.0,
}  # fmt: skip
MARKER = {
    "step": 5,
    "processes": 1,
    "files": {"a.bin": {"size": 3, "sha256": "0" * 64}, "b/c": {"size": 1, "sha256": "x"}},
}
POD = {
    "id": "p1", "name": "runner-r-1", "status": "RUNNING", "cost": 0.5, "gpu": {"id": "NVIDIA L4", "count": 1}, "cloud": "SECURE",
    "dataCenterId": "EU", "image": "i", "ssh": {"direct": {"host": "1.2.3.4", "port": 22, "username": "root"}, "proxy": {"username": "m"}},
    "createdAt": "2026-01-01T00:00:00Z", "startedAt": None, "disk": 20, "mounts": {"network": [{"volumeId": "v"}], "persistent": {"size": 5}},
    "cpu": {"vcpuCount": 4}, "env": {"RUNNER_RUN_ID": "r", "RUNNER_DEADLINE": "100.0"},
}  # fmt: skip
NAMES = ("metrics.jsonl", "evals.jsonl", "logs/worker.log", "status.json", "agent-status.json", "summary.json", "plan.json",
         "../x", "spec.json", "logs/../../x.log", "tensorboard/a/events.out", "", "/etc/passwd", "logs/\0.log", "x" * 300 + ".jsonl")  # fmt: skip


def line(rng: Random) -> bytes:
    """A line of `tail.py`, or of whoever sits in its place."""
    inner = mutate.json_text(rng, rng.choice((METRICS, STATUS)))
    data = base64.b64encode((inner + rng.choice(("\n", ""))).encode("utf-8", "surrogatepass")).decode()
    sent: dict[str, Any] = rng.choice((
        {"file": rng.choice(NAMES), "at": rng.choice((0, 0, 5, -1, 2**63, 1e9)), "data": data},
        {"whole": rng.choice(NAMES), "data": data}, {"checkpoints": [5, 10]}, {"beat": 1},
    ))  # fmt: skip
    if rng.random() < 0.4:
        return json.dumps(sent).encode()
    return mutate.json_text(rng, sent).encode("utf-8", "surrogatepass")


def test_a_line_of_a_pod_is_taken_or_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    (run.path / "logs").mkdir(parents=True)
    display = Display(Console(file=io.StringIO(), force_terminal=True, width=100))

    def read(text: bytes) -> None:
        follower = Follower(None, run, lambda: None)  # type: ignore[arg-type]  # no connection is opened
        for news in follower._take(text):
            display.tell(news)

    with display:
        fuzz(Target("lines of a pod", line, read))
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_files_of_a_run_are_read_whatever_they_hold(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()

    def given(rng: Random) -> tuple[str, str, str]:
        lines = "\n".join(mutate.json_text(rng, METRICS) for _ in range(2))
        return mutate.json_text(rng, STATUS), mutate.json_text(rng, SUMMARY), lines

    def read(texts: tuple[str, str, str]) -> None:
        for name, text in zip(("status.json", "summary.json", "metrics.jsonl"), texts, strict=True):
            (run.path / name).write_text(text, "utf-8", "surrogatepass")
        run.state()
        run.spent()
        rows = run_rows(tmp_path)
        print_runs(Console(file=io.StringIO(), width=200), rows, tmp_path)
        json.dumps(rows)

    fuzz(Target("status, summary, metrics", given, read))


def test_a_checkpoints_marker_is_read_whatever_it_holds(tmp_path: Path) -> None:
    folder = checkpoints.folder(RunDir(tmp_path), 5)
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc")

    def read(text: str) -> None:
        (folder / checkpoints.MARKER).write_text(text, "utf-8", "surrogatepass")
        said: list[str] = []
        checkpoints.newest(RunDir(tmp_path), said.append)
        assert all(len(one) < 2000 for one in said)

    fuzz(Target("COMPLETE", lambda rng: mutate.json_text(rng, MARKER), read))


def test_a_pods_spec_and_plan_are_adopted_or_refused(tmp_path: Path) -> None:
    spec = spec_of("model=mistral7b", "method=lora", "hw=rtx4090", "where=runpod").model_dump(mode="json")

    def read(text: str) -> None:
        adopted_spec.adopt_spec(text, "p1", None, tmp_path, "runpod")

    def plan(text: str) -> None:
        assert all(isinstance(number, (int, float)) for number in adopted_spec.adopt_plan(text).values())

    fuzz(Target("adopted specs", lambda rng: mutate.json_text(rng, spec), read))
    known = {"usd": 1.0, "usd_per_hour": 0.5, "hours": 2.0, "disk_gib": 20, "host_ram_gib": 8}
    fuzz(Target("adopted plans", lambda rng: mutate.json_text(rng, known), plan))
    fuzz(Target("JSON of a pod", lambda rng: mutate.json_text(rng, STATUS), json_text.object_of))


def test_a_pod_of_any_shape_is_listed() -> None:
    def read(raw: Any) -> None:
        if not isinstance(raw, dict) or "id" not in raw:
            return
        pod = json_types.pod(raw)
        fleet.run_of(pod)
        fleet.pod_deadline(pod)

    fuzz(Target("pods of the list", lambda rng: mutate.mutated(rng, POD), read))
