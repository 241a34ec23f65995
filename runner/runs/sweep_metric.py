"""Names that `run.metric` may have: the numbers of the `summary.json` that a run will write."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.did_you_mean import nearest
from runner.config.provenance import flattened
from runner.errors import Problem
from runner.plan.plan import Plan
from runner.report.summary import TRAINING, beside_plan
from runner.rundir.json_files import TrainSummary
from runner.spec import Dpo, Grpo, RunSpec

PAIRS = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected")
HELD_OUT = {
    "sft": ("loss", "perplexity"),
    "pretrain": ("loss", "perplexity"),
    "dpo": ("loss", *PAIRS),
    "kto": ("loss", *PAIRS, "kl"),
    "orpo": ("loss", *PAIRS, "nll_loss", "log_odds_ratio"),
    "reward": ("loss", "reward_accuracy", "reward_margin", "reward"),
    "grpo": (),
}
"""By objective: of held-out rows. GRPO answers their prompts, and computes no loss of them."""
ANSWERED = ("exact_match", "num_exact", "num_prompts", "num_endless")
"""Of the answers to held-out prompts."""
OTHERS = ("reward_std", "entropy", "completion_tokens", "completion_cut", "groups_alike")
"""Of training alone, unless an objective of the user's own measures them."""
EVAL_METRICS = tuple(dict.fromkeys([*(n for names in HELD_OUT.values() for n in names), *ANSWERED, *OTHERS]))
OF_ALL_RUNS = (*(f"train.{name}" for name in TrainSummary.__annotations__), "seconds", "peak_memory_gib")
METRICS = (
    *OF_ALL_RUNS,
    *(f"eval.{when}.{name}" for when in ("after", "before") for name in EVAL_METRICS),
    "eval.num_prompts",
)  # fmt: skip
OPEN_METRICS = ("plan.", "cost.", "eval.after.reward_", "eval.before.reward_")
"""Prefixes of metrics of plans and pods, and of a user's own reward functions."""
COST = tuple(f"cost.{name}" for name in ("usd", "predicted_usd", "hours", "predicted_hours", "usd_per_hour"))


def unknown_metric(key: str) -> Problem | None:
    """The problem with a `run.metric` that no run writes: a sweep would be a table of dashes."""
    if key in METRICS or key.startswith(OPEN_METRICS):
        return None
    near = nearest(key, METRICS)
    remedy = f"did you mean run.metric={near}?" if near else "write run.metric=eval.after.loss, or train.loss_last"
    return Problem(f"run.metric={key}: no run writes such a number", "run.metric", remedy)


def unwritten_metric(spec: RunSpec, planned: Plan | None) -> Problem | None:
    """The problem with a `run.metric` that this run does not write, naming what it writes."""
    key = spec.run.metric
    group = key.rpartition(".")[0] if key.startswith("eval.") else key.partition(".")[0]
    if key in OF_ALL_RUNS or key == "eval.num_prompts" or (group.startswith("eval") and spec.objective.code):
        return None
    if group.startswith("eval"):
        written = [f"{group}.{name}" for name in _measured(spec)]
        why = _why_not_measured(spec, key.rpartition(".")[2])
    elif group == "plan":
        written = list(_of_plan(spec, planned))
        why = "the plan of this run has no such number" if planned else "this run has no plan"
    else:
        written, why = list(COST if spec.is_rented else ()), "this run rents nothing"
        if spec.is_rented:
            why = "the bill of a pod has no such number"
    if key in written:
        return None
    names = written or [*OF_ALL_RUNS]
    return Problem(f"run.metric={key}: {why}", "run.metric", f"write run.metric= and one of {', '.join(names)}")


def _measured(spec: RunSpec) -> Iterator[str]:
    """Names in `eval.after`."""
    objective = spec.objective
    if not _may_hold_out(spec):
        return
    yield from HELD_OUT[objective.name]
    if isinstance(objective, Dpo) and not objective.has_reference:
        yield "nll_loss"
    if objective.asks_prompts and spec.eval.num_prompts:
        yield from ANSWERED
        if isinstance(objective, Grpo):
            yield from ("reward", *(f"reward_{name.rpartition(':')[2]}" for name in objective.rewards))


def _may_hold_out(spec: RunSpec) -> bool:
    data = spec.data
    named = data.source == "commands" or data.eval_path or data.eval_split or spec.objective.sharded
    return bool(named) or data.eval_fraction > 0


def _why_not_measured(spec: RunSpec, name: str) -> str:
    if not _may_hold_out(spec):
        return "data.eval_fraction=0 holds no rows out"
    if spec.objective.asks_prompts and not spec.eval.num_prompts and name not in HELD_OUT["sft"]:
        return "eval.num_prompts=0 asks no prompts"
    return f"objective={spec.objective.name} does not measure it"


def _of_plan(spec: RunSpec, planned: Plan | None) -> Iterator[str]:
    """Keys of the part `plan`, from the plan itself and measurements that are all 1."""
    if planned is None:
        return
    on_gpu = spec.hw.accelerator != "cpu"
    phases = dict.fromkeys([*(name for name in planned.phases if name not in TRAINING), "train"], 1.0)
    peaks = {"resident": 1.0, "outside": 1.0, "allocated": 1.0, "reserved": 1.0 if on_gpu else None, "phases": phases}
    for key, value in flattened({"plan": beside_plan(planned.as_dict(), peaks, 1.0, 1.0)}):
        if value is not None:
            yield key
