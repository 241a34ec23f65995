"""The executor of runs on this machine, and on the others of its hostfile; workers are processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import util
from typing import TextIO

from rich.console import Console

from runner.config.tracker_packages import package_of
from runner.errors import CannotRunError, Problem, Rewind
from runner.launcher import nodes, supervisor, torchrun
from runner.launcher.explain_failure import report_ending
from runner.launcher.warm_workers import WarmWorkers
from runner.machine import detect, kernels, torch_build
from runner.machine.processes import Killer, killer, oom_kills
from runner.report.invocation import install
from runner.rundir.directory import Outcome, RunDir
from runner.rundir.launch_options import DEFAULT_OPTIONS, LaunchOptions
from runner.spec import LocalPlace, RunSpec


def check(spec: RunSpec, launch_options: LaunchOptions = DEFAULT_OPTIONS) -> None:
    """CannotRunError, before anything is made or started, for what this machine, this version or another machine cannot
    run."""
    check_here(spec)
    nodes.check_nodes(spec)


def check_here(spec: RunSpec) -> None:
    """Refuse what this machine or this version cannot run; also called by a machine that joins a run."""
    reason = detect.why_not_here(spec.hw) if isinstance(spec.where, LocalPlace) else None
    if spec.hw.name == "local" and spec.hw.accelerator == "cpu":
        _check_gpus()
    if reason:
        remedy = "hw=local uses what this machine has; python -m runner list hw shows the rest"
        if able := detect.serving(spec.hw, detect.detect()):
            remedy = f"export CUDA_VISIBLE_DEVICES={able} shows the run those that will do; {remedy}"
        raise CannotRunError(Problem(reason, f"hw={spec.hw.name}", remedy))
    if util.find_spec("torch") is None or util.find_spec("trl") is None:
        raise CannotRunError(
            Problem("training needs torch, transformers, trl and peft, which are not installed", None, install("train"))
        )
    tracker = package_of(spec.track.name)
    if tracker is not None and not tracker.installed:
        what = f"track={spec.track.name} needs {tracker.title}, which is not installed"
        raise CannotRunError(Problem(what, "track", f"{install(tracker.extra)}, or write track=none"))
    if spec.hw.accelerator == "cuda":
        check_installed_torch(spec)
    if missing := kernels.no_compiler_of_layers(spec):
        raise CannotRunError(Problem(missing[0], "train.compile=true", missing[1]))
    if spec.deepspeed.name not in ("none", "auto") and util.find_spec("deepspeed") is None:
        what = f"deepspeed={spec.deepspeed.name} needs DeepSpeed, which is not installed"
        raise CannotRunError(Problem(what, None, "pip install deepspeed (Linux), or deepspeed=none"))


def _check_gpus() -> None:
    """CannotRunError where the CPU would take the place of GPUs that are broken, or that nobody can name."""
    machine = detect.detect()
    broken = [one for one in machine.unusable if one.broken]
    if broken and not machine.gpus and not machine.hides_all:
        raise CannotRunError(*(Problem(one.what, "hw=local", f"{one.remedy}; or hw=cpu") for one in broken))


def check_installed_torch(spec: RunSpec) -> None:
    """CannotRunError where the installed torch cannot use this machine's GPUs, or Triton cannot compile for them."""
    torch, used = torch_build.installed_torch(), detect.detect().gpus[: spec.hw.num_gpus]
    if torch is None or not used:  # of a named machine that is somewhere else
        return
    if reason := torch_build.why_not(torch, used, torch_build.driver()):
        build = "CUDA {}.{}".format(*torch.cuda) if torch.cuda else "CPU"
        raise CannotRunError(Problem(f"torch {torch.version} is a {build} build, {reason[0]}", None, reason[1]))
    old = [gpu for gpu in used if (gpu.compute_capability or kernels.TRITON_SINCE) < kernels.TRITON_SINCE]
    if old and kernels.compiles_kernels(spec):
        name = f"{old[0].name} (compute capability {old[0].compute_capability})"
        what = f"objective={spec.objective.name} trains with kernels that Triton compiles, and it has none for {name}"
        raise CannotRunError(Problem(what, "objective", "take a GPU since Volta (hw=v100, hw=t4), or hw=cpu"))
    if kernels.compiles_kernels(spec) and (missing := kernels.no_compiler()):
        raise CannotRunError(Problem(missing[0], None, missing[1]))
    if spec.train.liger is True and not kernels.has_liger():
        remedy = "pip install liger-kernel, or write train.liger=false"
        raise CannotRunError(Problem("Liger's kernels are not installed", "train.liger=true", remedy))
    if spec.train.liger is True and not kernels.has_liger_for(spec.model.architecture):
        what = f"the installed liger-kernel has no kernels for {spec.model.architecture} models"
        raise CannotRunError(Problem(what, "train.liger=true", "write train.liger=false, or leave it at auto"))


def confirm(
    asked: Sequence[tuple[RunSpec, dict[str, object]]], launch_options: LaunchOptions, console: Console
) -> bool:
    """True: nobody is asked about what costs nothing."""
    return True


def execute(
    run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: LaunchOptions = DEFAULT_OPTIONS
) -> Outcome:
    """Start the worker's processes on `run`, watch them to their end, say once what went wrong.

    `quiet_stdout` sends the worker's words to standard error and keeps standard output for JSON.
    """
    for claim in (run.path / "logs").glob("node*.json"):  # of an earlier start: see launcher/join.py
        claim.unlink()
    with nodes.started_nodes(run, spec) as others:
        while True:
            supervisor.remove_reports(run)
            stdout = sys.stderr if quiet_stdout else None
            ending, who = start_and_watch(
                run, spec, stdout=stdout, others=others, address=spec.hw.node_address, warm=launch_options.warm
            )
            code = report_ending(run, spec, ending, who)
            if code != Rewind.exit_code:
                others.well = code == 0
                return Outcome(run, code)


def start_and_watch(
    run: RunDir, spec: RunSpec, *, stdout: TextIO | None = None, others: nodes.RemoteNodes = nodes.NOBODY,
    node: int = 0, address: str | None = None, warm: WarmWorkers | None = None,
) -> tuple[supervisor.Ending, Callable[[], Killer]]:  # fmt: skip
    """Start this machine's processes and watch them until they end; how, and who killed them if they were killed."""
    counts = oom_kills()
    own = torchrun.ranks_of(spec, node) if spec.hw.num_nodes > 1 else None
    name = torchrun.log_of(node)
    with (run.path / "logs" / name).open("w", encoding="utf-8") as log:

        def cold() -> supervisor.Process:
            return torchrun.start_processes(run, spec, log, stdout, node=node, address=address)

        process = cold() if warm is None else warm.start(run, spec, stdout, cold)
        with supervisor.forward_signals(process, run, own) as asked:
            ending = supervisor.watch(process, run, spec.train.hang_minutes, own, name, others.lost, asked)
    return ending, lambda: killer(counts, oom_kills())
