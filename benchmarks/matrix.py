"""Every method on every ZeRO stage: trained by two processes, or refused with a remedy.

Nothing is assumed. A cell of the table is a run of the worker, which is resumed from its first checkpoint, read back,
exported, merged, and done again by one process (`matrix_checks`). All runs of so many processes are done one after
another by the same ones (`matrix_ranks`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import matrix_page
from benchmarks.bench import ROOT, Benchmark, alone, say
from benchmarks.matrix_page import MIXTURES
from runner.config.command_line import Request
from runner.config.compose import Sources, compose
from runner.errors import RunnerError
from runner.launcher import local
from runner.paths import DEEPSPEED_CONFIGS
from runner.plan.worker_environment import CPU_ENV, LOCALHOST
from runner.resolve.steps import resolve
from runner.rundir.directory import RunDir
from runner.runs import launch
from runner.spec import RunSpec

STAGES = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
METHODS = {name: (f"method={name}",) for name in ("full", "freeze", "lora", "qlora4", "qlora8")}
OPTIONS = {
    "lora, DoRA": ("method=lora", "method.use_dora=true"),
    "lora, PiSSA": ("method=lora", "method.init=pissa"),
    "lora, OLoRA": ("method=lora", "method.init=olora"),
    "lora, not packed": ("method=lora", "train.packing=false", "eval.every_steps=2"),
    "lora, dropout": ("method=lora", "method.dropout=0.1"),
    "lora, saved modules": ("method=lora", "method.modules_to_save=[embed_tokens,lm_head]"),
    "qlora4, DoRA": ("method=qlora4", "method.use_dora=true"),
    "qlora8, DoRA": ("method=qlora8", "method.use_dora=true"),
    "freeze, outside": ("method=freeze", "method.extra_modules=[embed_tokens,norm]"),
    "full, SGD": ("method=full", "train.optimizer=sgd", "train.learning_rate=0.5"),
    "full, Adafactor": ("method=full", "train.optimizer=adafactor"),
}
BF16 = {f"{name}, bf16": (*words, "train.precision=bf16") for name, words in METHODS.items()}
EXPERTS = {f"{name}, {title}": words for title in MIXTURES.values() for name, words in METHODS.items()}
ROWS = METHODS | OPTIONS | BF16 | EXPERTS
FEWER_STAGES = ("none", "zero2", "zero3")
"""For all but `METHODS`: ZeRO-1 is ZeRO-2 but for when gradients are reduced, and offloading moves the same tensors."""

WORLD, STEPS, SAVE_EVERY = 2, 4, 2
RUN = (
    "hw=cpu", "where=local", "data=commands", "data.max_examples=80", "data.max_eval_examples=8",
    "train.precision=fp32", "train.batch_size=8", "train.micro_batch_size=2", "train.max_length=192",
    f"train.max_steps={STEPS}", f"train.save_every_steps={SAVE_EVERY}", "train.learning_rate=5e-3",
    "train.warmup_ratio=0", "train.gradient_checkpointing=true", "eval.num_prompts=2", "eval.max_new_tokens=2",
)  # fmt: skip
LIMIT = 20_000
"""Elements that ZeRO-3 may hold whole, keep for their next use and update at once, and that ZeRO-1/2 gather at once.
By the project's JSONs it is 2e8 to 1e9, and everything of so small a model would simply stay whole."""


@dataclass(frozen=True)
class Cell:
    """One place of the table, and what is run for it."""

    row: str
    stage: str
    refused: dict[str, str | None] | None = None
    run: Any = None
    """RunDir of two processes; None where it is refused."""
    single: Any = None
    """RunDir of one process."""
    spec: Any = None

    @property
    def again(self) -> Path:
        """Where the run is finished a second time."""
        return Path(f"{self.run.path}-again")


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--rows`, `--stages`, `--keep`."""
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs in this new folder")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cells."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary) / "matrix").resolve()
        folder.mkdir(parents=True)
        found = worked(prepared(options.rows, options.stages, folder), folder)
    return {"cells": found, "seconds": round(time.perf_counter() - began)}


def prepared(rows: Sequence[str], stages: Sequence[str], folder: Path) -> list[Cell]:
    """Every cell with its run directories, or with the words in which it is refused."""
    from benchmarks.matrix_checks import base  # torch: 5 s

    kinds = {row: next((kind for kind, title in MIXTURES.items() if row.endswith(title)), "llama") for row in rows}
    models = {kind: base(folder / kind, kind) for kind in dict.fromkeys(kinds.values())}
    cells = []
    for stage in (stage for stage in STAGES if stage in stages):
        for row in (row for row in rows if row in METHODS or stage in FEWER_STAGES):
            model = models[kinds[row]]
            words = (*RUN, *ROWS[row], "model=hub", f"model.id={model}", f"deepspeed={stage}", *small(stage, folder))
            cells.append(cell_of(row, stage, words, folder))
    return cells


def small(stage: str, folder: Path) -> tuple[str, ...]:
    """The stage's JSON with its limits in proportion to the model, as words of the command line."""
    if stage == "none":
        return ()
    config = json.loads((DEEPSPEED_CONFIGS / f"{stage}.json").read_text("utf-8"))
    zero = config["zero_optimization"]
    zero |= {key: LIMIT for key, value in zero.items() if type(value) is int and value > LIMIT}
    if zero["stage"] == 3:
        zero["sub_group_size"] = LIMIT  # 1e9 where it is not written down
    file = folder / f"{stage}.json"
    file.write_text(json.dumps(config), "utf-8")
    return (f"deepspeed.config={file}",)


def cell_of(row: str, stage: str, words: tuple[str, ...], folder: Path) -> Cell:
    """Ask for the run as the command line does, with two processes and with one."""
    name = f"run.name={re.sub('[ ,]+', '-', row)}-{stage}"
    runs = []
    for world in (WORLD, 1):
        processes = (f"hw.num_processes={world}", f"hw.num_cpus={world}", f"run.output_dir={folder / f'runs-{world}'}")
        try:
            runs.append(prepare(Request(overrides=(*words, name, *processes))))
        except RunnerError as error:
            problem = error.problems[0]
            return Cell(row, stage, {"what": problem.what, "remedy": problem.remedy})
    (run, spec), (single, _) = runs
    return Cell(row, stage, None, run, single, spec)


def prepare(request: Request) -> tuple[RunDir, RunSpec]:
    """What `runner.runs.launch` does before it starts the worker."""
    composed = compose(request)
    spec, notes = resolve(composed, Sources(request))
    plan = launch.plan_or_refuse(spec, notes, composed)
    local.check(spec)
    run = RunDir.create(spec)
    if plan is not None and plan.deepspeed is not None:
        run.write("deepspeed.json", plan.deepspeed)
    return run, spec


def worked(cells: list[Cell], folder: Path) -> list[dict[str, Any]]:
    """Train and resume, then check, while a single process trains the same."""
    running = [cell for cell in cells if cell.refused is None]
    say(f"{len(running)} runs of {WORLD} processes, each resumed once …")
    work_off([{"run": str(cell.run.path), "again": str(cell.again)} for cell in running], WORLD, folder)
    say("The same by one process; meanwhile read back, export, merge …")
    with ThreadPoolExecutor(1) as pool:
        jobs = [{"run": str(cell.single.path), "again": None} for cell in running]
        single = pool.submit(work_off, jobs, 1, folder)
        found = [facts_of(cell, folder) for cell in cells]
        single.result()
    plain = {facts["row"]: facts["losses"] for facts in found if facts["stage"] == "none" and not facts["refused"]}
    for cell, facts in zip(cells, found, strict=True):
        if cell.refused is None:
            compare(cell, facts, plain.get(cell.row))
    return found


def work_off(jobs: list[dict[str, str | None]], world: int, folder: Path) -> None:
    """All of them in `world` processes. A run that fails ends these, and the rest begin anew."""
    file, left = folder / f"jobs-{world}.json", jobs
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{LOCALHOST}:0", "--local-addr", LOCALHOST,
        "-m", "benchmarks.matrix_ranks", str(file),
    ]  # fmt: skip
    env = {**os.environ, **CPU_ENV, "OMP_NUM_THREADS": "1"}
    while left:
        file.write_text(json.dumps(left), "utf-8")
        with (folder / f"ranks-{world}.log").open("a", encoding="utf-8") as log:
            subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        begun = [job for job in left if all(ended(run) for run in job.values() if run)]
        left = left[len(begun) + 1 :]


def ended(run: str) -> bool:
    """Whether a run got to its end."""
    return (Path(run) / "summary.json").is_file()


def facts_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """What the two runs of two processes tell; `apart` holds each check's `answer`."""
    facts: dict[str, Any] = {"row": cell.row, "stage": cell.stage, "refused": cell.refused}
    if cell.refused is not None:
        return facts
    from benchmarks import matrix_checks as checks

    run, spec = cell.run, cell.spec
    facts["losses"] = checks.losses(run)
    if not ended(str(run.path)):
        return facts | {"apart": {"train": checks.last_words(run)}}
    facts["held_out"] = checks.held_out(run)
    questions: dict[str, Callable[[], float | str | None]] = {
        "save": lambda: checks.saved(spec, run, range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)),
        "resume": lambda: checks.resumed(run, RunDir(cell.again)),
        "reload": lambda: checks.reloaded(spec, run),
        "export": lambda: checks.exported(spec, run, STEPS, folder / "exported" / run.id),
        "merge": lambda: checks.merged(spec, run, folder / "merged" / run.id),
    }
    return facts | {"apart": {name: checks.answer(ask) for name, ask in questions.items()}}


def compare(cell: Cell, facts: dict[str, Any], plain: list[float] | None) -> None:
    """Add what needs other runs: the curve beside the one without ZeRO, and beside the one of a single process."""
    from benchmarks import matrix_checks as checks

    apart = facts["apart"]
    if "train" not in apart:
        apart["train"] = checks.answer(lambda: checks.trained(cell.run, plain))
    apart["alone"] = None
    if "dropout" not in cell.row:  # every process draws its own zeros
        apart["alone"] = checks.answer(lambda: checks.alone(cell.run, cell.single))


BENCHMARK = Benchmark(
    "matrix", add_options, measure, matrix_page.section, measures=("runner/train", "deepspeed_configs", "conf/method")
)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
