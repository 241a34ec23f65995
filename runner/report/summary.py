"""`summary.json`, with the prediction beside the measurement, and the closing lines of a run."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from runner.plan.memory import COLLECTIVES, CONTEXT, GIB
from runner.report.invocation import as_invoked
from runner.report.metric import value_of
from runner.report.text import counted, duration
from runner.rundir.directory import RunDir, display_path
from runner.rundir.json_files import Summary
from runner.spec import RunSpec


def summary_of(
    spec: RunSpec, run: RunDir, trained: dict[str, Any], before: dict[str, Any], after: dict[str, Any],
    seconds: float, peaks: dict[str, Any],
) -> Summary:  # fmt: skip
    """The stable, documented record of a finished run (see docs/reference.md, Files of a run).

    `peaks` is `runner.train.memory_stats.Peaks.as_dict`.
    """
    losses = trained["losses"]
    positions_per_second = trained["positions"] / trained["seconds"]
    planned = _beside_plan(spec, run, peaks, positions_per_second, seconds)
    summary: Summary = {
        "run_id": run.id,
        "state": "done",
        "exit_code": 0,
        "model": spec.model.name,
        "method": spec.method.name,
        "objective": spec.objective.name,
        "hw": spec.hw.name,
        "data": spec.data.name,
        "train": {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "steps": trained["steps"],
            "examples": trained["examples"],
            "tokens": trained["tokens"],
            "tokens_per_second": positions_per_second,
            "effective_tokens_per_second": trained["tokens"] / trained["seconds"],
            "seconds": trained["seconds"],
            "trainable_parameters": trained["parameters"][0],
            "total_parameters": trained["parameters"][1],
        },
        "eval": {"num_prompts": after.get("num_prompts", 0), "before": before, "after": after},
        "seconds": seconds,
        "peak_memory_gib": peaks["resident"] if peaks["reserved"] is None else peaks["reserved"],
        "model_dir": str(run.path / "model"),
    }
    if planned:
        summary["plan"] = planned
    return summary


def _beside_plan(
    spec: RunSpec, run: RunDir, peaks: dict[str, object], tokens_per_second: float, seconds: float
) -> dict[str, object] | None:
    """The part `plan`; its time runs from the creation of the run, before torch was imported, as the plan's does."""
    plan, created = run.read("plan.json"), run.status.get("created")
    if not plan:
        return None
    waited: float | None = time.time() - created if created else seconds
    if run.read("resumes.json") or run.read("rewinds.json"):  # it stood still in between
        waited = None
    return {"device": spec.hw.gpu or "CPU", **beside_plan(plan, peaks, tokens_per_second, waited)}


def metric_of(summary: Mapping[str, object], key: str) -> float:
    """The number behind a dotted key of a summary; NaN where there is none."""
    value = value_of(summary, key)
    return math.nan if value is None else value


def print_summary(console: Console, summary: Summary, run: RunDir) -> None:
    """Print what was trained, before → after, how long, where it is, and what to type next."""
    train, measured = summary["train"], summary["eval"]
    before, after = measured["before"], measured["after"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = train["trainable_parameters"] / train["total_parameters"]
    table.add_row(
        "Trained",
        f"{summary['model']} with {summary['method']} on {summary['data']}: {train['trainable_parameters']:,} "
        f"parameters ({share:.2%}), {counted(train['steps'], 'step')}, {train['tokens']:,} tokens",
    )
    table.add_row("Loss", f"{train['loss_first']:.4f} → [bold]{train['loss_last']:.4f}[/bold]")
    if "exact_match" in after:
        count, then, now = after["num_prompts"], before["num_exact"], after["num_exact"]
        table.add_row("Held out", f"answered exactly: {then} of {count} → [bold green]{now} of {count}[/bold green]")
    if "loss" in after:
        table.add_row("Held-out loss", f"{before['loss']:.4f} → {after['loss']:.4f}")
    for name, words in (("reward", "Reward"), ("reward_margin", "Margin"), ("reward_accuracy", "Preferred")):
        if name in after and name in before:
            table.add_row(words, f"held out: {before[name]:.4g} → [bold green]{after[name]:.4g}[/bold green]")
    table.add_row(
        "Time",
        f"{duration(summary['seconds'])}, of which training {duration(train['seconds'])} at "
        f"{train['tokens_per_second']:,.0f} tokens/s; peak memory {summary['peak_memory_gib']:.1f} GiB",
    )
    if "plan" in summary:
        table.add_row("Plan", plan_line(summary["plan"]))
    where = display_path(run.path)
    table.add_row("Model", f"{where}/model")
    table.add_row("Loss curve", f"{where}/loss.png")
    console.print()
    console.print(table, highlight=False)
    if summary.get("objective") == "reward":
        return  # a model that says no words
    command = f"{as_invoked('python -m runner')} chat {shlex.quote(where)}"
    console.print(f"\nTry it:  [bold]{command}[/bold]", highlight=False, soft_wrap=True)


def plan_line(planned: dict[str, Any]) -> str:
    """`predicted 2.1 GiB, 4 min 10 s; measured 2.2 GiB, 4 min 41 s`."""
    parts = []
    for key in ("predicted", "measured"):
        size, seconds = planned["peak_gib"][key], planned["seconds"][key]
        time_ = "" if seconds is None else f", {duration(seconds)}"
        parts.append(f"{key} {size:.1f} GiB{time_}")
    return "; ".join(parts)


TRAINING = ("forward", "backward", "step")
"""Phases of a plan that are measured as one."""


def beside_plan(
    plan: Mapping[str, Any], peaks: Mapping[str, Any], tokens_per_second: float, seconds: float | None
) -> dict[str, Any]:
    """Predicted, measured, and `error` = predicted / measured - 1, for memory, speed and time (None: not measured).

    `peaks` is `runner.train.memory_stats.Peaks.as_dict`. On a GPU torch's allocator sees its own memory only: what it
    reserved is compared with the plan less its terms `process` and `collectives`, what it allocated with the plan
    less `allocator_slack` as well.
    """
    on_gpu = peaks["reserved"] is not None
    hours = plan["hours"]
    found: dict[str, Any] = {
        "peak_gib": _peak(plan, peaks, on_gpu),
        "phases": _phases(plan, peaks["phases"], on_gpu),
        "tokens_per_second": pair(plan["tokens_per_second"], tokens_per_second),
        "seconds": pair(None if hours is None else hours * 3600, seconds),
    }
    if on_gpu:
        terms = plan["phases"][plan["peak_phase"]]
        found["outside_gib"] = pair(_outside(terms), peaks["outside"])
        found["host_ram_gib"] = pair(plan["host_ram_gib"], peaks["resident"])
    return found


def pair(predicted: float | None, measured: float | None) -> dict[str, float | None]:
    """Two numbers and how far the first is from the second; positive where too much was predicted."""
    error = round(predicted / measured - 1, 4) if predicted is not None and measured else None
    return {"predicted": _rounded(predicted), "measured": _rounded(measured), "error": error}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _peak(plan: Mapping[str, Any], peaks: Mapping[str, Any], on_gpu: bool) -> dict[str, float | None]:
    total = plan["peak_gib"]
    if not on_gpu:
        return {**pair(total["expected"], peaks["resident"]), "low": total["low"], "high": total["high"]}
    terms = plan["phases"][plan["peak_phase"]]
    predicted = sum(terms.values()) - _outside(terms)
    several = "collectives" in terms
    low, high = (
        total[case] - (CONTEXT[case] + (COLLECTIVES[case] if several else 0.0)) / GIB for case in ("low", "high")
    )
    allocated = pair(predicted - terms.get("allocator_slack", 0.0), peaks["allocated"])
    return {
        **pair(predicted, peaks["reserved"]),
        "low": _rounded(low),
        "high": _rounded(high),
        **{f"{name}_allocated": value for name, value in allocated.items()},
    }


def _outside(terms: Mapping[str, float]) -> float:
    return terms.get("process", 0.0) + terms.get("collectives", 0.0)


def _phases(plan: Mapping[str, Any], measured: Mapping[str, float], on_gpu: bool) -> dict[str, dict[str, float | None]]:
    """Phase by phase; the passes of training as one."""
    sums = {name: sum(terms.values()) - on_gpu * _outside(terms) for name, terms in plan["phases"].items()}
    sums["train"] = max(sums[name] for name in TRAINING)
    return {name: pair(sums.get(name), size) for name, size in measured.items()}
