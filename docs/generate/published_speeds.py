"""Speeds that others published (`published_speeds.json`) beside the plan of the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from docs.generate.planning_examples import Table, spec_of
from runner.plan.plan import plan_of
from runner.plan.run_time import RunFacts
from runner.resolve.plan_inputs import stage_search
from runner.spec import HardwareSpec, ModelSpec, RunSpec

FILE = Path(__file__).with_suffix(".json")
OWN_STACK = ("qwen", "a800")
"""Sources that ran transformers with PEFT or DeepSpeed, as this project does."""
Run = dict[str, Any]

TOKENS: dict[str, Callable[[float, float, int], float]] = {
    "tokens/s": lambda figure, tokens, gpus: figure,
    "tokens/s/GPU": lambda figure, tokens, gpus: figure * gpus,
    "s/step": lambda figure, tokens, gpus: tokens / figure,
    "sequences/s": lambda figure, tokens, gpus: figure,
}
"""Tokens a second of all GPUs, from a figure, the tokens of a step and the number of GPUs."""


class Compared(NamedTuple):
    """One published run."""

    run: Run
    published: float
    """Tokens a second of all GPUs."""
    planned: float

    @property
    def ratio(self) -> float:
        """Planned over published: below 1 the plan is too slow."""
        return self.planned / self.published


@cache
def content() -> dict[str, Any]:
    """The file."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


def spec_for(run: Run) -> RunSpec:
    """The run as this project would be asked for it."""
    hw, gpus = spec_of(f"hw={run['hw']}").hw, run.get("gpus")
    world = gpus or hw.num_gpus
    batch = run["micro_batch"] * run["accumulation"] * world
    checkpointing = json.dumps(run["checkpointing"])
    known = run["model"] not in content()["models"]
    spec = spec_of(
        f"model={run['model'] if known else 'mistral7b'}", f"method={run['method']}", f"hw={run['hw']}",
        f"deepspeed={run['stage']}" if world > 1 else "deepspeed=none", f"train.max_length={run['length']}",
        "train.precision=bf16", "train.packing=false", "train.liger=false",
        *([f"hw.num_gpus={gpus}"] if gpus else []), f"train.gradient_checkpointing={checkpointing}",
        f"train.micro_batch_size={run['micro_batch']}", f"train.batch_size={batch}",
    )  # fmt: skip
    return spec if known else spec.model_copy(update={"model": _model(run["model"])})


def _model(name: str) -> ModelSpec:
    return ModelSpec(id=name, context_length=8192, **content()["models"][name])


@cache
def compared() -> tuple[Compared, ...]:
    """Every run of the file with its plan."""
    return tuple(_compared(run) for run in content()["runs"])


def _compared(run: Run) -> Compared:
    spec = spec_for(run)
    options = stage_search(spec)
    assert options is not None
    step = plan_of(spec, options, RunFacts(num_steps=1000), []).step_seconds
    assert step is not None
    gpus = _gpus(spec.hw)
    sequences = run["micro_batch"] * run["accumulation"] * gpus
    tokens = sequences * run["length"]
    published = run["published"] * run["length"] if run["unit"] == "sequences/s" else run["published"]
    return Compared(run, TOKENS[run["unit"]](published, tokens, gpus), tokens / step)


def _gpus(hw: HardwareSpec) -> int:
    return hw.num_gpus or 1


GROUPS: dict[str, Callable[[Run], bool]] = {
    "transformers with PEFT or DeepSpeed": lambda run: run["source"] in OWN_STACK,
    "other software, not compiled": lambda run: run["source"] not in OWN_STACK and not run.get("compiled"),
    "other software, `torch.compile`": lambda run: bool(run.get("compiled")),
}


def ratios(group: str) -> list[float]:
    """Planned over published of a group's runs that no figure of the plan was fitted to."""
    return [one.ratio for one in compared() if GROUPS[group](one.run) and not one.run.get("fitted")]


def speeds() -> Table:
    """All runs, by group."""
    rows: list[tuple[str, ...]] = []
    for group in GROUPS.values():
        rows += [_row(one) for one in compared() if group(one.run)]
    return ("software", "run", "GPU", "tokens × micro batch", "published", "plan", "plan / published"), rows


def _row(one: Compared) -> tuple[str, ...]:
    run, spec = one.run, spec_for(one.run)
    source = content()["sources"][run["source"]]
    again = {True: "checkpointing", False: "no checkpointing"}.get(run["checkpointing"], "every 2nd layer again")
    words = [run["model"], run["method"], *([run["stage"]] if run["stage"] != "none" else []), again]
    words += ["compiled"] if run.get("compiled") else []
    gpus = _gpus(spec.hw)
    size = f"{run['length']:,} × {run['micro_batch']}"
    size += f" × {run['accumulation']}" if run["accumulation"] > 1 else ""
    return (
        f"[{run['source']}]({source['url']}), {source['date']}",
        ", ".join(words),
        f"{gpus} × {spec.hw.gpu}" if gpus > 1 else str(spec.hw.gpu),
        size,
        f"{one.published:,.0f}",
        f"{one.planned:,.0f}",
        f"{one.ratio:.2f}{' *' if run.get('fitted') else ''}",
    )


def summary() -> str:
    """Median and range of each group."""
    lines = []
    for name in GROUPS:
        found = ratios(name)
        lines.append(
            f"- {name}: median **{median(found):.2f}**, {min(found):.2f} to {max(found):.2f} ({len(found)} runs)"
        )
    return "\n".join(lines)


def sources() -> str:
    """What each source ran."""
    return "\n".join(f"- {name}: {one['title']}. {one['software']}." for name, one in content()["sources"].items())
