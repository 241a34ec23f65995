"""Keys that a verb does not read: typed with it, they are said to have no effect."""

from __future__ import annotations

from fnmatch import fnmatch

from runner.request import Request

_ARITHMETIC = (
    "model.title", "model.aliases", "hw.title", "hw.aliases", "method.alpha", "method.use_rslora", "method.quant_type",
    "method.outlier_threshold", "objective.label_smoothing", "objective.desirable_weight",
    "objective.undesirable_weight", "objective.center", "objective.reward_weights", "objective.temperature",
    "objective.clip", "data.num_proc", "train.learning_rate", "train.schedule", "train.warmup_ratio",
    "train.weight_decay", "train.hang_minutes", "train.on_loss_spike", "where.data_centers", "where.cpu_type",
    "where.cuda_versions", "where.max_replacements", "where.keep", "where.pod", "where.heartbeat_minutes",
    "where.bad_host_minutes", "where.setup_minutes", "where.deadline_hours", "where.volume_gb",
    "where.container_disk_gb", "method.init", "objective.loss_on",
    "run.on_changed_inputs", "run.metric", "run.metric_mode", "push.*", "sweep.*",
)  # fmt: skip
"""Change neither memory nor time nor money."""
UNREAD = {
    "plan": (*_ARITHMETIC, "run.*"),
    "fit": (*_ARITHMETIC, "run.*", "track", "track.*"),
    "doctor": tuple(key for key in _ARITHMETIC if not key.startswith("where.")),
}
_TOKENS = ("data", "data.*", "model", "model.*", "objective")
READ = {
    "data preview": (*_TOKENS, "objective.loss_on", "train.max_length"),
    "data stats": (*_TOKENS, "objective.loss_on", "train.max_length", "train.seed"),
    "data prepare": (
        *_TOKENS, "objective.*", "train.max_length", "train.packing", "train.seed", "eval.*", "where", "where.*",
    ),
}  # fmt: skip
"""Verbs that read little: all that they do."""


def reads(verb: str, key: str) -> bool:
    """The key can change what the verb answers, in some combination."""
    if verb in READ:
        return any(fnmatch(key, pattern) for pattern in READ[verb])
    return not any(fnmatch(key, pattern) for pattern in UNREAD.get(verb, ()))


def notes(verb: str, request: Request) -> list[str]:
    """One sentence for the keys and choices among the typed words that `verb` does not read; what a recipe sets is
    meant for a run."""
    typed = dict.fromkeys(word.lstrip("+~").partition("=")[0] for word in request.overrides)
    keys = [key for key in typed if key != "recipe" and not reads(verb, key)]
    if not keys:
        return []
    listed = " and ".join(filter(None, (", ".join(keys[:-1]), keys[-1])))
    return [f"{listed} {'has' if len(keys) == 1 else 'have'} no effect on {verb}"]
