"""Typed keys that a verb does not read, named in a note."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from runner.config.command_line import Request
from runner.spec.data import SIZES

_OF_SWEEPS = ("run.metric", "run.metric_mode", "sweep.*")
_ARITHMETIC = (
    "model.aliases", "model.gguf_file", "model.learning_rate_full", "model.learning_rate_adapter",
    "model.num_parameters", "hw.aliases", "hw.gpu", "hw.node_address", "method.alpha", "method.init",
    "method.outlier_threshold", "method.quant_type", "method.use_rslora",
    "objective.center", "objective.chosen_weight", "objective.code", "objective.options",
    "objective.clip", "objective.desirable_weight", "objective.gzip", "objective.label_smoothing",
    "objective.lines_per_shard", "objective.loss_on", "objective.reward_length", "objective.reward_regex",
    "objective.reward_weights", "objective.simpo_margin", "objective.temperature", "objective.undesirable_weight",
    "data.answer_field", "data.num_proc", "data.on_error", "data.weight_field", "train.hang_minutes",
    "train.learning_rate", "train.liger", "train.on_loss_spike", "train.schedule", "train.spike_factor",
    "train.warmup_ratio", "train.weight_decay", "where.bad_host_minutes", "where.container_disk_gb", "where.cpu_type",
    "where.country", "where.cuda_versions", "where.data_centers", "where.deadline_hours", "where.heartbeat_minutes",
    "where.image", "where.keep", "where.max_replacements", "where.pod", "where.setup_minutes", "where.template",
    "where.volume", "where.volume_gb", "track.*", "push.*", "run.name", "run.on_changed_inputs", *_OF_SWEEPS,
)  # fmt: skip
"""Change neither memory nor time nor money."""
_CARDS = tuple(f"data.{key}" for key in SIZES)
"""Facts of a data set's card, for verbs that do not read the rows."""
UNREAD = {
    "run": _OF_SWEEPS,
    "plan": (*_ARITHMETIC, "run.*", "track"),
    "fit": (
        *_ARITHMETIC, "run.*", "track", "model.title", "hw.title", "hw.env", "hw.rented_vcpus_per_gpu", "hw.price_date",
        "hw.runpod_gpu_id", "data.max_eval_examples", "data.num_eval_rows", "eval.max_new_tokens", "eval.num_prompts",
        "model.gated", "objective.shards", "train.max_grad_norm",
        "train.keep_checkpoints", "train.save_every_minutes", "train.save_every_steps", "where.cloud",
        "where.max_hours", "where.max_usd",
    ),
    "doctor": (*_ARITHMETIC, "method.learning_rate_ratio", "model.title", "hw.title"),
    "data preview": (*_CARDS, "data.max_eval_examples", "data.max_examples", "data.num_proc", "data.on_long"),
    "data stats": (*_CARDS, "data.num_proc", "data.on_long"),
    "data prepare": _CARDS,
}  # fmt: skip
_ROWS = ("data", "data.*", "model", "model.id", "model.package", "model.gguf_file", "model.revision", "objective")
READ = {
    "data preview": (*_ROWS, "objective.loss_on", "train.max_length"),
    "data stats": (*_ROWS, "model.context_length", "train.max_length", "train.seed"),
    "data prepare": (
        *_ROWS, "model.from_scratch", "model.vocab_size", "objective.experiment", "objective.gzip",
        "objective.code", "objective.lines_per_shard", "objective.loss_on", "objective.max_new_tokens",
        "objective.mode", "objective.options", "track.code",
        "objective.reward_regex", "objective.rewards", "objective.root", "objective.shards", "objective.take",
        "objective.tokenizer", "objective.val_ratio", "train.max_length", "train.packing", "train.seed",
        "eval.every_steps", "where", "where.volume", "deepspeed.config",
    ),
}  # fmt: skip
"""Verbs that read little: all that they do, but for what stands above."""
_CHOOSE = ("where.country", "where.data_centers", "where.volume", "where.pod")
"""Bind a run to hardware that is somewhere, and so choose it where none is named."""
_CALLED = {"run": "a run without -m"}


def verb_reads(verb: str, key: str) -> bool:
    """The key can change what the verb answers, in some combination."""
    if _named(key, UNREAD.get(verb, ())):
        return False
    return verb not in READ or _named(key, READ[verb])


def _named(key: str, keys: tuple[str, ...]) -> bool:
    group, dot, _ = key.partition(".")
    return key in keys or (bool(dot) and f"{group}.*" in keys)


def unread_key_notes(verb: str, request: Request, said: Collection[str] = ()) -> list[str]:
    """One sentence for the keys and choices among the typed words that `verb` does not read, and one for each word that
    a later one takes back; what a recipe sets is meant for a run. Not for those that a note has `said` to have no
    effect at all."""
    typed = dict.fromkeys(word.lstrip("+~").partition("=")[0] for word in request.overrides)
    known = {note.partition(" has no effect: ")[0] for note in said}
    choosing = _CHOOSE if verb == "plan" and "hw" not in typed else ()
    keys = [key for key in typed if key not in ("recipe", *known, *choosing) and not verb_reads(verb, key)]
    notes = list(taken_back(request))
    if keys:
        listed = " and ".join(filter(None, (", ".join(keys[:-1]), keys[-1])))
        notes.append(f"{listed} {'has' if len(keys) == 1 else 'have'} no effect on {_CALLED.get(verb, verb)}")
    return notes


def taken_back(request: Request) -> Iterator[str]:
    """A sentence for each typed word that a later one takes back."""
    words = [word for word in request.overrides if "=" in word]
    last = {word.lstrip("+").partition("=")[0]: word for word in words}
    for word in dict.fromkeys(words):
        final = last[word.lstrip("+").partition("=")[0]]
        if word != final:
            yield f"{word} has no effect: {final} comes after it"
