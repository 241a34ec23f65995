"""Many runs one after another in the same processes: `torchrun … -m benchmarks.matrix_ranks JOBS.json`.

JOBS is a list of {run, again}: run directories with their `spec.json`. Each is worked on to its end, by the worker
itself. With `again` the run is then copied there as it was after its first checkpoint, and finished a second time.
Importing torch, transformers and DeepSpeed takes 5 s; one of these runs takes 2 s.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from rich.console import Console
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from runner.report.progress import Progress
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.runs import resume
from runner.spec import RunSpec
from runner.train.__main__ import RANK, quiet_libraries
from runner.train.distributed import Ranks, destroy_process_group, init_process_group
from runner.train.trainers.stop_on_signal import StopOnSignal
from runner.train.worker import work

FAILED = "failed.txt"


def main() -> None:
    """All jobs, or up to the first that fails: it leaves its stack trace in the run directory."""
    console = Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the end
    gc.freeze()  # what is imported stays: without this every collection looks through it for a second
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        run = RunDir(Path(job["run"]))
        try:
            ranks = finish(run, console)
            if job["again"]:
                copy = RunDir(Path(job["again"]))
                if ranks.main:
                    rewind(run, copy)
                ranks.barrier()
                finish(copy, console)
        except Exception:
            (run.path / FAILED).write_text(traceback.format_exc(), "utf-8")
            os._exit(1)  # the other process waits in a collective that will never end
    destroy_process_group()


def finish(run: RunDir, console: Console) -> Ranks:
    """One run to its end, as `runner.train` does it; then nothing of it is left in this process."""
    spec = run.spec
    quiet_libraries(run.path / "logs" / f"rank{RANK}.log")
    ranks = init_process_group(spec)
    environment = dict(os.environ)
    finished: Any = work(spec, run, Progress(console), StopOnSignal(ranks), ranks)
    del finished
    gc.collect()  # the trainer with its settings, which transformers takes for a living DeepSpeed
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    os.environ.clear()
    os.environ.update(environment)  # ACCELERATE_USE_DEEPSPEED, say
    return ranks


def rewind(run: RunDir, copy: RunDir) -> None:
    """`copy` is the run as a kill after its first checkpoint leaves it, and as `resume` takes it up."""
    later = checkpoints.steps(run)[1:]
    gone = {"model", "summary.json", "loss.png", "answers_after.jsonl", *(f"checkpoint-{step}" for step in later)}
    shutil.copytree(run.path, copy.path, ignore=lambda folder, names: gone & set(names))
    resume.record_spec(copy, RunSpec.model_validate(copy.read("spec.json")), ())


if __name__ == "__main__":
    main()
