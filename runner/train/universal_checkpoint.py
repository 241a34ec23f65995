"""Universal checkpoints: a DeepSpeed checkpoint for another number of ranks or another ZeRO stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from runner.errors import Problem, RunFailedError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, write_atomically
from runner.spec import RunSpec
from runner.train.distributed import Ranks

LATEST = "latest_universal"  # the file in which DeepSpeed looks for the folder's name


def fits(spec: RunSpec, path: Path, ranks: Ranks) -> bool:
    """Whether the checkpoint's shards are this run's own."""
    noted = checkpoints.facts(path)
    return noted.get("processes") == ranks.world and noted.get("stage") == spec.deepspeed.name


def prepare(
    spec: RunSpec, run: RunDir, step: int, ranks: Ranks, config: dict[str, Any] | None
) -> dict[str, Any] | None:
    """DeepSpeed's settings to go on after `step`: if need be the checkpoint is converted (one folder per weight), once.

    RunFailedError where DeepSpeed cannot convert it.
    """
    path = checkpoints.folder(run, step)
    if config is None or not step or fits(spec, path, ranks):
        return config
    problem = _convert(run, path) if ranks.main and not (path / LATEST).is_file() else None
    problem = ranks.from_main(problem)
    if problem is not None:
        noted = checkpoints.facts(path)
        remedy = f"go on with {noted.get('processes')} processes and deepspeed={noted.get('stage')}, which wrote it"
        raise RunFailedError(Problem(f"checkpoint {step} cannot be divided anew: {problem}", None, remedy))
    return {**config, "checkpoint": {"load_universal": True}}


def _convert(run: RunDir, path: Path) -> str | None:
    """DeepSpeed's own converter, in a process of its own; its last line if it fails."""
    tag = (path / "latest").read_text("utf-8").strip()
    target = path / f"{tag}_universal"
    words = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    words += ["--input_folder", str(path / tag), "--output_folder", str(target)]
    log = run.path / "logs" / "universal.log"
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run([sys.executable, *words], stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} ({log})"
    write_atomically(path / LATEST, target.name)
    return None
