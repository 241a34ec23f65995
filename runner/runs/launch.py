"""Launch a run: from a request to its end, by the executor of `where=` (one table: `executor_of`)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import click
from rich.console import Console

from runner.config.command_line import Request
from runner.config.compose import Sources
from runner.doctor import system
from runner.errors import InterruptedRun, Problem, RunnerError
from runner.launcher import inherited_ranks
from runner.paths import state_dir
from runner.plan.plan import Plan
from runner.plan.worker_environment import MEETING_SECONDS
from runner.report import terminal
from runner.report.invocation import as_invoked
from runner.report.tables import headline, in_one_line
from runner.report.text import dump
from runner.resolve import config_facts, plan_inputs
from runner.resolve.steps import resolve, with_facts
from runner.rundir.directory import Outcome, RunDir, display_path
from runner.rundir.launch_options import DEFAULT_OPTIONS, LaunchOptions
from runner.rundir.lock import own_run
from runner.runs import input_digests, inputs, origins, unread_keys
from runner.runs import resume as resuming
from runner.runs.content_checks import check_contents
from runner.runs.notify import check_notify, notifying
from runner.spec import RunSpec


def run(
    request: Request,
    composed: RunSpec,
    console: Console,
    as_json: bool,
    launch_options: LaunchOptions = DEFAULT_OPTIONS,
) -> int:
    """Run what `request` composes and return the worker's exit code."""
    spec, notes = resolve(composed, Sources(request), fetch=True)
    notes += [*unread_keys.unread_key_notes("run", request, notes), *resuming.unfinished_note(request)]
    planned = plan_or_refuse(spec, notes, composed)
    try:
        check_launch(spec, notes, composed, launch_options)
        notes += system.check_disk(spec, planned)
    except RunnerError:
        if planned is not None:
            line = f"Plan    {in_one_line(planned)}"
            Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise
    if not confirm_costs([(spec, planned)], launch_options, console):
        return InterruptedRun.exit_code
    outcome = create_and_execute(
        spec, notes, console, as_json, planned=planned, launch_options=launch_options, asked=(request, composed)
    )
    if as_json:
        click.echo(dump(outcome.run.summary or outcome.run.status))
    return outcome.exit_code


def resume(
    run: RunDir, overrides: tuple[str, ...], config_dirs: tuple[Path, ...], console: Console, as_json: bool,
    launch_options: LaunchOptions = DEFAULT_OPTIONS,
) -> int:  # fmt: skip
    """Go on with a run in its own directory; the exit code of the worker."""
    request = resuming.resume_request(run, overrides, config_dirs)
    resuming.check_can_resume(run)
    with own_run(run):
        return _resume(run, request, overrides, console, as_json, launch_options)


def _resume(
    run: RunDir,
    request: Request,
    overrides: tuple[str, ...],
    console: Console,
    as_json: bool,
    launch_options: LaunchOptions,
) -> int:
    """Go on with a run that this process owns."""
    composed = resuming.compose_resumed(run, request)
    spec, notes = resolve(composed, Sources(request), fetch=True)
    if spec.is_rented or (state_dir() / "ledger.db").exists():
        from runner.cloud.fleet import refuse_second_pod  # only where a pod may have the run

        notes += refuse_second_pod(run.id, spec.where.name if spec.is_rented else None)
    notes += resuming.check_same_run(run, spec)
    planned = plan_or_refuse(spec, notes, composed)
    check_launch(spec, notes, composed, launch_options)
    if not confirm_costs([(spec, planned)], launch_options, console):
        return InterruptedRun.exit_code
    with resuming.recording_resume(run, spec, overrides):
        origins.record_resume(run, overrides)
        outcome = execute_in(run, spec, notes, console, as_json, planned, launch_options)
    if as_json:
        click.echo(dump(run.summary or run.status))
    return outcome.exit_code


def plan_or_refuse(spec: RunSpec, notes: list[str], composed: RunSpec) -> Plan | None:
    """Plan the run before anything is made; CannotRunError for what does not fit or costs too much.

    `composed` is the run as it was asked for, from which the refusal works out what would fit.

    None for a model that the arithmetic does not know: the run goes on without a plan, and says so. RequestError where
    data or model are not there.
    """
    planned = plan_inputs.plan_if_known(spec, notes)
    if planned is None:
        notes.append(f"no plan: {config_facts.why_no_plan(spec)}")
    notes += check_contents(spec)  # before the plan refuses what it could not count
    if planned is not None and planned.reasons:
        plan_inputs.refuse_plan(with_facts(composed), planned)
    notes += inputs.check_inputs(spec, planned)
    return planned


def check_launch(
    spec: RunSpec, notes: list[str], composed: RunSpec, launch_options: LaunchOptions = DEFAULT_OPTIONS
) -> None:
    """Refuse what cannot run where it is to run; what `where=auto` would rent is refused as its choice, not as a pod
    that somebody named."""
    try:
        check_notify(spec, launch_options)
        executor_of(spec).check(spec, launch_options)
        if spec.push.to:
            from runner.hub.upload import check_push

            notes += check_push(spec)
    except RunnerError as error:
        if composed.where.name != "auto" or spec.where.name == "local":
            raise
        chosen = next(note for note in notes if note.startswith("where=auto"))
        remedy = (
            f"or write hw={spec.hw.name} where=local on a machine that has it; "
            f"python -m runner fit model={spec.model.name} hw=local says what fits here"
        )
        told = [Problem(f"{chosen}; {p.what}", p.source, f"{p.remedy}, {remedy}") for p in error.problems]
        raise type(error)(*told) from None


def create_and_execute(
    spec: RunSpec, notes: list[str], console: Console, as_json: bool, sweep: str | None = None,
    planned: Plan | None = None, launch_options: LaunchOptions = DEFAULT_OPTIONS,
    asked: tuple[Request, RunSpec] | None = None,
) -> Outcome:  # fmt: skip
    """Make the run directory, say what is about to happen, and run. `asked` are the request and what it composed to."""
    spec = inputs.with_absolute_paths(spec)
    run = RunDir.create(spec, sweep)
    if asked is not None:
        origins.record_origins(run, *asked, spec)
    with own_run(run):
        input_digests.record_digests(run, spec)
        return execute_in(run, spec, notes, console, as_json, planned, launch_options)


def execute_in(
    directory: RunDir, spec: RunSpec, notes: list[str], console: Console, as_json: bool, planned: Plan | None,
    launch_options: LaunchOptions = DEFAULT_OPTIONS,
) -> Outcome:  # fmt: skip
    """Say what is about to happen in a run directory, write the plan there, and run."""
    (directory.path / "logs").mkdir(exist_ok=True)
    consoles = (console, terminal.appended(directory.path / "logs" / "run.log"))

    def say(line: str) -> None:
        for one in consoles:
            one.print(line, highlight=False, soft_wrap=True)

    say(headline(spec, display_path(directory.path)))
    if planned is not None:
        directory.write("plan.json", planned.as_dict())
        say(f"Plan    {in_one_line(planned)}")
        if planned.deepspeed is not None:
            directory.write("deepspeed.json", planned.deepspeed)
    left = [] if spec.is_rented else inherited_ranks.inherited_rank_notes()
    for note in [*notes, *left, *_waits_for(directory, spec)]:
        say(f"Note    {as_invoked(note)}")
    with notifying(directory, spec, say) as ended:
        outcome = executor_of(spec).execute(directory, spec, quiet_stdout=as_json, launch_options=launch_options)
        ended(outcome)
    if outcome.exit_code == 0 and spec.push.to and spec.where.name == "local":  # a pod uploads by itself
        from runner.hub.upload import push_finished

        say(f"Pushed  {push_finished(directory)}")
    from runner.report.run_report.write import write_report  # read when there is something to report

    if (page := write_report(directory)) is not None:
        say(f"Report  {display_path(page)}")
    return outcome


def _waits_for(directory: RunDir, spec: RunSpec) -> list[str]:
    """The command to type on the other machines, where they are not started by ssh."""
    if spec.hw.num_nodes == 1 or spec.hw.hostfile:
        return []
    word = f"cd {shlex.quote(os.getcwd())} && python -m runner join {shlex.quote(display_path(directory.path))}"
    others = "the other machine" if spec.hw.num_nodes == 2 else f"each of the {spec.hw.num_nodes - 1} other machines"
    return [f"waiting up to {MEETING_SECONDS // 60} minutes for {others}; type there: {word}"]


def confirm_costs(
    asked: Sequence[tuple[RunSpec, Plan | None]], launch_options: LaunchOptions, console: Console
) -> bool:
    """Show what is rented for these runs with its price, and ask for agreement."""
    renting = [(spec, plan.as_dict() if plan else {}) for spec, plan in asked if spec.is_rented]
    return not renting or executor_of(renting[0][0]).confirm(renting, launch_options, console)


class Executor(Protocol):
    """A place that runs can be executed at; a module with these functions is one."""

    def check(self, spec: RunSpec, launch_options: LaunchOptions) -> None:
        """RunnerError, before anything is made or rented, for what cannot run there."""

    def confirm(
        self, asked: Sequence[tuple[RunSpec, dict[str, object]]], launch_options: LaunchOptions, console: Console
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
