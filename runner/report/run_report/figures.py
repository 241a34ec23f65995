"""Figures of a run as rows of text, for the page and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from shlex import quote
from typing import Any, NamedTuple

from runner.report.run_report.facts import BETTER_IS_MORE, RunFacts, part
from runner.report.text import duration

LABELS = {
    "loss": "Held-out loss",
    "perplexity": "Perplexity",
    "exact_match": "Answered exactly",
    "reward": "Reward",
    "reward_margin": "Reward margin",
    "reward_accuracy": "Pairs ranked correctly",
    "num_endless": "Answers that did not stop",
}
SHARES = ("exact_match", "reward_accuracy", "completion_cut", "groups_alike")
LESS = ("loss", "perplexity", "num_endless", "nll_loss")
PHASES = {"load": "Load", "eval": "Evaluation", "train": "Training", "save": "Save"}


class Change(NamedTuple):
    """A held-out metric before and after training."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None


class Comparison(NamedTuple):
    """A planned figure beside the measured one."""

    name: str
    planned: str
    measured: str
    error: str
    planned_number: float | None
    measured_number: float | None


def number(value: object, digits: int = 4) -> str:
    """`0.0065`, `1,234`, `NaN`, `–`: four significant digits, whole numbers whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def usd(value: float) -> str:
    """`$1.20`, `$0.0042`."""
    return f"${value:,.2f}" if value >= 0.01 or value == 0 else f"${value:.4f}"


def headline(facts: RunFacts) -> list[tuple[str, str]]:
    """What, on what, how long, what it cost, and how it came out."""
    rows = [("Model", facts.name_of("model")), ("Method", facts.name_of("method")), ("Data", facts.data_name)]
    if (objective := facts.name_of("objective")) not in ("–", "sft"):
        rows.append(("Objective", objective))
    rows.append(("Hardware", _hardware(facts)))
    total = facts.status.get("num_steps")
    if facts.step is not None:
        of = f" of {total:,}" if total and total != facts.step else ""
        rows.append(("Steps", f"{facts.step:,}{of}"))
    if facts.seconds:
        rows.append(("Time", duration(facts.seconds)))
    rows.append(("Cost", _cost(facts)))
    train = part(facts.summary, "train")
    if "tokens" in train:
        rows.append(("Tokens", number(train["tokens"])))
    if train.get("total_parameters"):
        share = train["trainable_parameters"] / train["total_parameters"]
        rows.append(("Trained parameters", f"{train['trainable_parameters']:,} ({share:.2%})"))
    if "peak_memory_gib" in facts.summary:
        rows.append(("Peak memory", f"{facts.summary['peak_memory_gib']:.1f} GiB"))
    return rows


def _hardware(facts: RunFacts) -> str:
    hw = part(facts.spec, "hw")
    count, gpu = hw.get("num_gpus"), hw.get("gpu")
    if gpu and count:
        nodes = f", {hw['num_nodes']} machines" if hw.get("num_nodes", 1) != 1 else ""
        return f"{count} × {gpu}{nodes}"
    cpus = hw.get("num_cpus")
    return f"CPU, {cpus} cores" if hw.get("accelerator") == "cpu" and cpus else facts.name_of("hw")


def _cost(facts: RunFacts) -> str:
    if facts.cost_usd is not None:
        predicted = part(facts.status, "cost").get("predicted_usd")
        more = f" ({usd(predicted)} planned)" if isinstance(predicted, int | float) else ""
        return usd(facts.cost_usd) + more
    rented = facts.name_of("where") not in ("local", "–")
    return "not known yet" if rented else "nothing rented"


def changes(facts: RunFacts) -> list[Change]:
    """Held-out metrics before → after; of a run that is not done, what was measured so far."""
    measured = part(facts.summary, "eval")
    before, after = part(measured, "before"), part(measured, "after")
    before = before or facts.run.read("before.json")
    names = [name for name in {**before, **after} if name not in ("num_prompts", "num_exact")]
    return [_change(name, before, after) for name in names]


def _change(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    then, now = before.get(name), after.get(name)
    text, better = "–", None
    if isinstance(then, int | float) and isinstance(now, int | float) and math.isfinite(then) and math.isfinite(now):
        difference = now - then
        text = (
            f"{100 * difference:+.1f} points"
            if name in SHARES
            else f"{'+' if difference > 0 else ''}{number(difference)}"
        )
        if difference and (name in LESS or name in BETTER_IS_MORE):
            better = (difference < 0) == (name in LESS)
    return Change(
        LABELS.get(name, name.replace("_", " ").capitalize()), _measured(name, before), _measured(name, after), text,
        better,
    )  # fmt: skip


def _measured(name: str, found: Mapping[str, Any]) -> str:
    value = found.get(name)
    if name == "exact_match" and "num_exact" in found and "num_prompts" in found:
        return f"{found['num_exact']} of {found['num_prompts']}"
    if name in SHARES and isinstance(value, int | float) and math.isfinite(value):
        return f"{value:.1%}"
    return number(value)


def comparisons(facts: RunFacts) -> list[Comparison]:
    """Plan beside measured: memory by phase, then peak, speed and time. Without a summary, the plan alone."""
    measured = part(facts.summary, "plan")
    if not measured:
        return _planned_only(facts.plan)
    rows = [_beside(PHASES.get(name, name), pair, "GiB") for name, pair in part(measured, "phases").items()]
    rows.append(_beside("Peak memory", part(measured, "peak_gib"), "GiB"))
    for key, title in (("host_ram_gib", "Main memory"), ("outside_gib", "Outside the allocator")):
        if key in measured:
            rows.append(_beside(title, part(measured, key), "GiB"))
    rows.append(_beside("Throughput", part(measured, "tokens_per_second"), "tokens/s"))
    rows.append(_beside("Time", part(measured, "seconds"), "s"))
    return rows


def _planned_only(plan: Mapping[str, Any]) -> list[Comparison]:
    rows = []
    for name, terms in part(plan, "phases").items():
        if isinstance(terms, Mapping):
            size = sum(v for v in terms.values() if isinstance(v, int | float))
            rows.append(_beside(name.capitalize(), {"predicted": size}, "GiB"))
    if isinstance(speed := plan.get("tokens_per_second"), int | float):
        rows.append(_beside("Throughput", {"predicted": speed}, "tokens/s"))
    if isinstance(hours := plan.get("hours"), int | float):
        rows.append(_beside("Time", {"predicted": hours * 3600}, "s"))
    return rows


def _beside(name: str, pair: Any, unit: str) -> Comparison:
    pair = pair if isinstance(pair, Mapping) else {}
    planned, measured = (v if isinstance(v := pair.get(k), int | float) else None for k in ("predicted", "measured"))
    error = pair.get("error")
    return Comparison(
        name, _with_unit(planned, unit), _with_unit(measured, unit),
        f"{error:+.1%}" if isinstance(error, int | float) else "–", planned, measured,
    )  # fmt: skip


def _with_unit(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return duration(value) if unit == "s" else f"{value:,.0f} {unit}" if unit == "tokens/s" else f"{value:.2f} {unit}"


def data_statistics(facts: RunFacts) -> list[tuple[str, str]]:
    """Rows and tokens, as the worker counted them."""
    found = part(facts.environment, "data")
    rows = [(name.replace("_", " ").capitalize(), _statistic(name, value)) for name, value in found.items()]
    train = part(facts.summary, "train")
    if not found and "examples" in train:
        rows.append(("Training rows", number(train["examples"])))
    if "tokens" in train:
        rows.append(("Tokens trained on", number(train["tokens"])))
    if epochs := part(facts.spec, "train").get("num_epochs"):
        limit = part(facts.spec, "train").get("max_steps")
        rows.append(("Epochs asked for", f"{number(epochs)}" + (f", at most {limit:,} steps" if limit else "")))
    if fingerprint := facts.environment.get("data_fingerprint"):
        rows.append(("Fingerprint", str(fingerprint)))
    return rows


def _statistic(name: str, value: object) -> str:
    return f"{value:.1%}" if name == "packing_efficiency" and isinstance(value, int | float) else number(value)


def environment(facts: RunFacts) -> list[tuple[str, str]]:
    """Versions, machine and commits, in the file's order."""
    rows = []
    for name, value in facts.environment.items():
        if name in ("data", "data_fingerprint", "packages") or value in (None, [], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else number(value)
        rows.append((name.replace("_", " ").capitalize().replace("Gpus", "GPUs").replace("Cuda", "CUDA"), text))
    packages = part(facts.environment, "packages")
    rows += [(str(name), str(version)) for name, version in packages.items() if version]
    return rows


def typed(facts: RunFacts) -> str:
    """The command line that started the run."""
    return " ".join(["python -m runner", *map(quote, facts.typed)])
