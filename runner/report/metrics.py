"""Numbers of `summary.json` that a sweep can be sorted by."""

from __future__ import annotations

from runner.config.suggestions import nearest
from runner.errors import Problem

TRAIN = (
    "loss_first", "loss_last", "steps", "examples", "tokens", "tokens_per_second", "effective_tokens_per_second",
    "seconds", "trainable_parameters", "total_parameters",
)  # fmt: skip
MEASURED = (
    "loss", "perplexity", "exact_match", "num_exact", "num_prompts", "reward", "reward_std", "reward_margin",
    "reward_accuracy", "reward_chosen", "reward_rejected", "log_odds_ratio", "nll_loss", "kl", "entropy",
    "completion_tokens", "completion_cut", "groups_alike", "logps_chosen", "logps_rejected",
)  # fmt: skip
"""Before and after training; which of them depends on objective and data."""
METRICS = (
    *(f"train.{name}" for name in TRAIN),
    *(f"eval.{when}.{name}" for when in ("after", "before") for name in MEASURED),
    "eval.num_prompts", "seconds", "peak_memory_gib",
)  # fmt: skip
OPEN = ("plan.", "cost.", "eval.after.reward_", "eval.before.reward_")
"""What comes beside a plan or a pod, and what reward functions of one's own are called."""


def unknown_metric(key: str) -> Problem | None:
    """What is wrong with `run.metric`: with a name that no run writes, a sweep would be a table of dashes."""
    if key in METRICS or key.startswith(OPEN):
        return None
    near = nearest(key, METRICS)
    remedy = f"did you mean run.metric={near}?" if near else "write run.metric=eval.after.loss, or train.loss_last"
    return Problem(f"run.metric={key}: no run writes such a number", "run.metric", remedy)
