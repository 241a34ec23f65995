"""How long a command takes that trains nothing, as a user feels it: from Enter to the prompt."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, quartiles, say, table
from runner.config import deepspeed_json
from runner.config.command_line import Request
from runner.config.compose import compose
from runner.plan.auto_values import resolve_hardware_autos
from runner.plan.choose_stage import StageChoice, StageSearch, allowed_stages, batches, checkpointings
from runner.plan.search import combinations
from runner.resolve.fit import candidate_methods, candidate_models, with_default_length
from runner.resolve.plan_inputs import hardware

EXPLANATION = """\
## Startup

Whole processes of commands that answer before training: a rejected typo, the resolved run, a list, the origin of a
value. None imports torch; the last rows show Python and single imports on the same machine. The commands take turns,
so that load affects all of them, and the first round (cold files) is not counted. Medians above their target are
marked. The ratio, for comparing machines, is to importing Hydra, OmegaConf and pydantic alone, which every command
needs.
"""


@dataclass(frozen=True)
class Timed:
    """A command, as arguments of Python, and the exit code that shows it did its work."""

    what: str
    arguments: tuple[str, ...]
    exit_code: int = 0
    target_ms: int | None = None
    """What the median should stay below; None where nobody has promised anything."""
    target_ratio: float | None = None
    """The same, in times of `BASE`."""

    @property
    def typed(self) -> str:
        """As a user types it."""
        return "python " + " ".join(f'"{a}"' if " " in a else a for a in self.arguments)


RUNNER = ("-m", "runner")
BASE = "Hydra, OmegaConf and pydantic alone"
COMMANDS = (
    Timed("reject a typo", (*RUNNER, "train.lr=1"), exit_code=2, target_ms=300),
    Timed("show a resolved run", (*RUNNER, "show", "model=phi2")),
    Timed("list the models", (*RUNNER, "list", "models")),
    Timed("explain a value", (*RUNNER, "explain", "train.learning_rate", "recipe=phi2_lora_rtx6000adax5")),
    Timed(
        "plan a run", (*RUNNER, "plan", "model=mistral7b", "method=full", "hw=h100x3"), target_ms=350, target_ratio=2.6
    ),
    Timed("plan one that cannot fit", (*RUNNER, "plan", "model=llama2_70b", "method=full", "hw=rtx4090"), exit_code=3),
    Timed("find hardware for a run", (*RUNNER, "fit", "model=llama2_70b", "method=lora"), target_ms=450),
    Timed("plan the whole catalogue", (*RUNNER, "fit", "--json"), target_ms=2000),
    Timed("Python alone", ("-c", "pass")),
    Timed(BASE, ("-c", "import hydra, pydantic, omegaconf")),
    Timed("torch alone", ("-c", "import torch")),
    Timed("transformers alone", ("-c", "import transformers")),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--repeats`."""
    parser.add_argument("--repeats", type=int, default=20, help="runs of each command (default 20)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every run of every command; the commands take turns."""
    seconds: dict[str, list[float]] = {command.what: [] for command in COMMANDS}
    for turn in range(options.repeats + 1):
        for command in COMMANDS:
            taken = _seconds(command)
            if turn:
                seconds[command.what].append(round(taken, 4))
        say(f"startup: round {turn} of {options.repeats}")
    commands = [{"what": c.what, "typed": c.typed, "seconds": seconds[c.what]} for c in COMMANDS]
    return {"commands": commands, "plans": plans()}


class Counting(StageSearch):
    """Counts the plans that are worked out."""

    computed = 0

    def choice(self, *arguments: Any) -> StageChoice:
        """As Options does."""
        self.computed += 1
        return super().choice(*arguments)


def plans() -> dict[str, int]:
    """What `fit` over the whole catalogue decides: rows, the plans they were chosen from, and those worked out for it.

    A ZeRO stage whose weights alone are too large, and micro batches beside one that fits with headroom, are decided
    without working them out.
    """
    options, spec = Counting(deepspeed_json.deepspeed_templates()), with_default_length(compose(Request()), {})
    found = [
        resolve_hardware_autos(one) for one in combinations(spec, candidate_models(), candidate_methods({}), hardware())
    ]
    weighed = 0
    for one in found:
        weighed += len(allowed_stages(one)) * len(batches(one)) * len(checkpointings(one))
        options.best(one)
    return {"rows": len(found), "weighed": weighed, "computed": options.computed}


def _seconds(command: Timed) -> float:
    """Wall time of one process; RuntimeError if it did not end as it should."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's second command finds the modules compiled
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command.arguments], cwd=ROOT, env=env, capture_output=True)
    taken = time.perf_counter() - began
    if done.returncode != command.exit_code:
        words = done.stderr.decode(errors="replace")
        raise RuntimeError(f"{command.typed} ended with {done.returncode}, not {command.exit_code}:\n{words}")
    return taken


def section(measured: dict[str, Any]) -> str:
    """Milliseconds per command."""
    rows = []
    base = next((quartiles(c["seconds"])[1] for c in measured["commands"] if c["what"] == BASE), None)
    for command in measured["commands"]:
        low, middle, high = (1000 * value for value in quartiles(command["seconds"]))
        fastest, slowest = 1000 * min(command["seconds"]), 1000 * max(command["seconds"])
        spread = [f"{low:,.0f}–{high:,.0f}", f"{fastest:,.0f}–{slowest:,.0f}", str(len(command["seconds"]))]
        target = _against(command["what"], middle)
        ratio = _ratio(command["what"], middle / 1000 / base) if base else "–"
        rows.append([f"{command['what']}: `{command['typed']}`", f"**{middle:,.0f}**", target, ratio, *spread])
    head = ["command", "median, ms", "target, ms", "ratio", "middle half", "fastest–slowest", "runs"]
    return f"{EXPLANATION}\n{table(head, rows)}{_weighed(measured.get('plans'))}"


def _against(command: str, median_ms: float) -> str:
    """The target, and whether it was missed."""
    target = next((c.target_ms for c in COMMANDS if c.what == command), None)
    if target is None:
        return "–"
    return f"< {target:,}" + (", **missed**" if median_ms >= target else "")


def _ratio(command: str, ratio: float) -> str:
    """The median in times of `BASE`, and whether a target was missed."""
    target = next((c.target_ratio for c in COMMANDS if c.what == command), None)
    against = "" if target is None else f" (< {target:g})" if ratio < target else f" (< {target:g}, **missed**)"
    return f"{ratio:.2f}{against}"


def _weighed(counted: dict[str, int] | None) -> str:
    if counted is None:  # measured before they were counted
        return ""
    return (
        f"\n\nThe whole catalogue is {counted['rows']:,} rows, each the best of what is open to it: "
        f"{counted['weighed']:,} plans are weighed, {counted['computed']:,} of them worked out."
    )


BENCHMARK = Benchmark(
    "startup",
    add_options,
    measure,
    section,
    measures=(
        "runner/__main__.py",
        "runner/cli",
        "runner/config",
        "runner/spec",
        "runner/plan",
        "runner/resolve",
        "conf",
    ),
)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
