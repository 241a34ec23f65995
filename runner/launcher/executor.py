"""The executor of runs on this machine, and on the others of its hostfile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from runner.launcher import local
from runner.rundir.directory import RunDir
from runner.rundir.launch_options import DEFAULT_OPTIONS, LaunchOptions
from runner.rundir.outcome import Outcome
from runner.spec import RunSpec


def check(spec: RunSpec, launch_options: LaunchOptions = DEFAULT_OPTIONS) -> None:
    """CannotRunError for what this machine cannot run."""
    local.check(spec)


def confirm(asked: Sequence[tuple[RunSpec, dict[str, Any]]], launch_options: LaunchOptions, console: Console) -> bool:
    """True: nobody is asked about what costs nothing."""
    return True


def execute(
    run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: LaunchOptions = DEFAULT_OPTIONS
) -> Outcome:
    """Start the run's processes and watch them to their end."""
    return local.execute(run, spec, quiet_stdout=quiet_stdout, warm=launch_options.warm)
