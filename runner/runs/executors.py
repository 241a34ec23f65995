"""Where a run is executed: one executor for each `where=`, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from rich.console import Console

from runner.rundir.directory import Outcome, RunDir
from runner.rundir.launch_options import LaunchOptions
from runner.spec import RunSpec


class Executor(Protocol):
    """A place that runs can be executed at; a module with these functions is one."""

    def check(self, spec: RunSpec, launch_options: LaunchOptions) -> None:
        """RunnerError, before anything is made or rented, for what cannot run there."""

    def confirm(
        self, asked: Sequence[tuple[RunSpec, dict[str, Any]]], launch_options: LaunchOptions, console: Console
    ) -> bool:  # fmt: skip
        """Ask the user to agree to the cost of these runs, given their plans; True where they cost nothing."""

    def execute(self, run: RunDir, spec: RunSpec, *, quiet_stdout: bool, launch_options: LaunchOptions) -> Outcome:
        """Run `spec` in its directory to its end. `quiet_stdout` keeps standard output for JSON."""


EXECUTORS = {"local": "runner.launcher.local"}
RENTED = "runner.cloud.executor"
"""The module of each place, and of every place at a provider, imported when a run is executed there: 0.1 s of the half
second that a typo takes."""


def executor_of(spec: RunSpec) -> Executor:
    """The executor of a resolved run."""
    return cast(Executor, import_module(EXECUTORS.get(spec.where.name, RENTED)))


if TYPE_CHECKING:  # both are executors, or the type check fails
    from runner.cloud import executor as _rented
    from runner.launcher import local as _here

    _implementations: tuple[Executor, ...] = (_here, _rented)
