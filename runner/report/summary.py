"""`summary.json` and the closing lines of a run."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from runner.rundir import RunDir
from runner.spec import RunSpec


def summary_of(
    spec: RunSpec, run: RunDir, trained: dict[str, Any], before: dict[str, Any], after: dict[str, Any],
    seconds: float, peak_memory_gib: float,
) -> dict[str, Any]:  # fmt: skip
    """The stable, documented record of a finished run (see docs/reference.md, Files of a run)."""
    losses = trained["losses"]
    return {
        "run_id": run.id,
        "state": "done",
        "exit_code": 0,
        "model": spec.model.name,
        "method": spec.method.name,
        "hw": spec.hw.name,
        "data": spec.data.name,
        "train": {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "steps": trained["steps"],
            "examples": trained["examples"],
            "tokens": trained["tokens"],
            "tokens_per_second": trained["positions"] / trained["seconds"],
            "effective_tokens_per_second": trained["tokens"] / trained["seconds"],
            "seconds": trained["seconds"],
            "trainable_parameters": trained["parameters"][0],
            "total_parameters": trained["parameters"][1],
        },
        "eval": {"num_prompts": after.get("num_prompts", 0), "before": before, "after": after},
        "seconds": seconds,
        "peak_memory_gib": peak_memory_gib,
        "model_dir": str(run.path / "model"),
    }


def metric_of(summary: dict[str, Any], key: str) -> float:
    """The number behind a dotted key of a summary; NaN where there is none."""
    value: Any = summary
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def print_summary(console: Console, summary: dict[str, Any], run: RunDir) -> None:
    """What was trained, before → after, how long, where it is, and what to type next."""
    train, measured = summary["train"], summary["eval"]
    before, after = measured["before"], measured["after"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = train["trainable_parameters"] / train["total_parameters"]
    table.add_row(
        "Trained",
        f"{summary['model']} with {summary['method']} on {summary['data']}: {train['trainable_parameters']:,} "
        f"parameters ({share:.2%}), {train['steps']} steps, {train['tokens']:,} tokens",
    )
    table.add_row("Loss", f"{train['loss_first']:.4f} → [bold]{train['loss_last']:.4f}[/bold]")
    if "exact_match" in after:
        count, then, now = after["num_prompts"], before["num_exact"], after["num_exact"]
        table.add_row("Held out", f"answered exactly: {then} of {count} → [bold green]{now} of {count}[/bold green]")
    if "loss" in after:
        table.add_row("Held-out loss", f"{before['loss']:.4f} → {after['loss']:.4f}")
    table.add_row(
        "Time",
        f"{duration(summary['seconds'])}, of which training {duration(train['seconds'])} at "
        f"{train['tokens_per_second']:,.0f} tokens/s; peak memory {summary['peak_memory_gib']:.1f} GiB",
    )
    where = shown(run.path)
    table.add_row("Model", f"{where}/model")
    table.add_row("Loss curve", f"{where}/loss.png")
    console.print()
    console.print(table, highlight=False)
    console.print(f"\nTry it:  [bold]python -m runner chat {shlex.quote(where)}[/bold]", highlight=False)


def shown(path: Path) -> str:
    """A path as one would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def duration(seconds: float) -> str:
    """`48 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
