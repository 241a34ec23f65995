"""Execute a run in a pod, in a directory that was sent there.

`python -m runner.launcher.on_pod runs/<id>/spec.json`, by the agent; the exit code is the run's. Needs neither Hydra
nor a terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from runner.errors import RunnerError
from runner.launcher import local
from runner.report.text import print_problems
from runner.rundir.directory import RunDir


def main(argv: list[str]) -> int:
    """Run the spec in its folder to the end."""
    run = RunDir(Path(argv[0]).absolute().parent)
    try:
        spec = run.spec
        local.check(spec)
        return local.execute(run, spec).exit_code
    except RunnerError as error:
        run.set_status("failed", exit_code=error.exit_code, error=str(error))
        print_problems(Console(stderr=True), error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
