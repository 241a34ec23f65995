"""What trains in the pods of `chaos_pods`: a training's files and signals, without torch. Run by the pod's agent.

`python -m benchmarks.pod_training spec.json` in place of `python -m runner.launcher.on_pod spec.json`: a step every
50 ms, a checkpoint every 20, a second of evaluating before and after, and at the end a model of random bytes, and then
its sum in a file beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, write_atomically

STEP_S, EVERY, EVALUATED = 0.05, 20, 20
"""Of a second each, and how many of them come between two checkpoints, and pass while it evaluates."""
MODEL, SUM = "model/adapter_model.safetensors", "model.sha256"


def main(spec: Path) -> int:
    """The exit code of a training: 0, or 130 with a checkpoint after a signal."""
    run, asked = RunDir(spec.absolute().parent), list[int]()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.append(1))
    steps = json.loads(spec.read_text("utf-8"))["train"]["max_steps"]
    done = checkpoints.newest(run) or 0
    lines = (run.path / "metrics.jsonl").read_text("utf-8").splitlines() if done else []
    with (run.path / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        metrics.writelines(f"{line}\n" for line in lines[:done])
        _evaluate(run, asked, "before")
        run.set_status("training", num_steps=steps)
        for step in range(done + 1, steps + 1):
            time.sleep(STEP_S)
            metrics.write(json.dumps({"step": step, "loss": 1 / step, "time": time.time()}) + "\n")
            metrics.flush()
            if step % EVERY == 0 or asked:
                _save(run, step)
            if asked:
                run.set_status("interrupted", exit_code=130)
                return 130
    _evaluate(run, asked, "after")
    run.set_status("saving")
    file = run.path / MODEL
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(os.urandom(1_000_000))
    train = {"loss_first": 1.0, "loss_last": 1 / steps, "steps": steps, "tokens": 0, "trainable_parameters": 0}
    measured = {"num_prompts": 0, "before": {}, "after": {}}
    run.write("summary.json", {"run_id": run.id, "state": "done", "exit_code": 0, "train": train, "eval": measured})
    run.set_status("done", exit_code=0)
    write_atomically(run.path / SUM, hashlib.sha256(file.read_bytes()).hexdigest())
    return 0


def _evaluate(run: RunDir, asked: list[int], when: str) -> None:
    """A signal cuts it short."""
    run.set_status("evaluating", when=when)
    for _ in range(EVALUATED):
        if not asked:
            time.sleep(STEP_S)


def _save(run: RunDir, step: int) -> None:
    folder = checkpoints.folder(run, step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.bin").write_bytes(os.urandom(100_000))
    checkpoints.seal(folder, {"step": step})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
