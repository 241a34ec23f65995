"""Tokenise and pack a run's data, in a worker process."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

from runner.runs.artifact_process import environment, waited
from runner.runs.content_checks import check_read
from runner.spec import RunSpec


def prepare(spec: RunSpec, as_json: bool) -> int:
    """Exit code of the process; what it says goes where this one's words go. RequestError for data that are wrong."""
    for note in check_read(spec):
        print(f"Note    {note}", file=sys.stderr)
    command = [sys.executable, "-m", "runner.train.prepare", *["--json"] * as_json]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment())
    assert worker.stdin is not None
    with suppress(BrokenPipeError), worker.stdin:
        worker.stdin.write(spec.model_dump_json())
    return waited(worker)
