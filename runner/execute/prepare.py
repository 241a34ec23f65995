"""Have a run's data tokenised and packed by a process of its own, which imports what that takes."""

from __future__ import annotations

import subprocess
import sys

from runner.content_checks import check_read
from runner.execute.offline import environment
from runner.spec import RunSpec


def prepare(spec: RunSpec, as_json: bool) -> int:
    """Exit code of the process; what it says goes where this one's words go. RequestError for data that are wrong."""
    for note in check_read(spec):
        print(f"Note    {note}", file=sys.stderr)
    command = [sys.executable, "-m", "runner.train.prepare", *["--json"] * as_json]
    return subprocess.run(command, input=spec.model_dump_json(), text=True, env=environment()).returncode
