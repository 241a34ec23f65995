"""Setup of a run: rows tokenised, model loaded, trainer built, environment noted; everything before the first step."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from runner import __version__
from runner.data.row_checks import nothing_held_out
from runner.errors import Problem, RequestError
from runner.machine import kernels
from runner.paths import ASSETS
from runner.report.progress import Progress
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.rundir.json_files import State, StatusFacts
from runner.spec import RunSpec
from runner.train import (
    compiled_layers,
    deepspeed_config,
    model_loading,
    model_saving,
    preload,
    stop_tokens,
    trainable_weights,
    varlen_attention,
)
from runner.train.checkpoint_saving import CheckpointPush, CheckpointSealer
from runner.train.distributed import Ranks
from runner.train.evaluation.before_after import BeforeAfter
from runner.train.heartbeat import Heartbeat
from runner.train.memory_stats import Peaks
from runner.train.objectives import objective_of
from runner.train.objectives.objective import Examples, Objective
from runner.train.tokens.token_cache import Tokenised, describe_rows, row_statistics, tokenizer_fingerprint
from runner.train.trackers import Tracker, tracker_of
from runner.train.trainers.callbacks import MetricsWriter
from runner.train.trainers.guarded_trainer import LossGuardMixin
from runner.train.trainers.loss_guard import LossGuard
from runner.train.trainers.stop_on_signal import StopOnSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed", "tokenizers",
)  # fmt: skip
FINGERPRINTS = {"data_fingerprint": "the rows", "tokenizer_fingerprint": "the tokenizer or its chat template"}


@dataclass(frozen=True)
class Process:
    """This process of a run: where it writes, whom it works with, and how it is stopped."""

    run: RunDir
    progress: Progress
    stop: StopOnSignal
    ranks: Ranks
    heartbeat: Heartbeat

    def enter(self, state: State, **facts: Unpack[StatusFacts]) -> None:
        """Begin a state of the run: a heartbeat, and `status.json` by the main process."""
        self.heartbeat.beat(state)
        if self.ranks.main:
            self.run.set_status(state, **facts)


@dataclass(frozen=True)
class Data:
    """The rows of a run, and what they were tokenised with."""

    examples: Examples
    source: str
    """Hub id or folder of the model, for `from_pretrained`."""
    tokenizer: PreTrainedTokenizerBase
    train: Tokenised
    held: Tokenised | None
    fingerprints: dict[str, str]
    """Digests of rows and tokenizer, which a resumed run must find again."""


@dataclass(frozen=True)
class Setup:
    """A run that can begin to train."""

    spec: RunSpec
    """With the tokenizer that pretraining made."""
    data: Data
    start: int
    """Step after which the run resumes; 0 for a new one."""
    steps: int
    """Optimiser steps in total."""
    trainer: LossGuardMixin
    metrics: MetricsWriter
    before_after: BeforeAfter
    tracker: Tracker
    sealer: CheckpointSealer
    push: CheckpointPush
    peaks: Peaks


def set_up(spec: RunSpec, process: Process) -> Setup:
    """Load everything and build the trainer; RequestError for what can only be known now."""
    run, progress, ranks = process.run, process.progress, process.ranks
    start = _resume_step(process)
    peaks = Peaks(spec.hw.accelerator == "cuda")
    if spec.hw.accelerator == "cpu" and spec.hw.num_cpus:
        torch.set_num_threads(max(1, spec.hw.num_cpus // (spec.hw.num_processes or 1)))
    set_seed(spec.train.seed)

    objective = objective_of(spec)
    objective.prepare(progress.note, process.heartbeat.beat, ranks)
    spec = objective.spec
    data = _load_data(objective, process, start)
    steps = objective.num_steps(len(data.train.rows))
    tracker = tracker_of(spec, run, progress.note, ranks.main)
    if line := tracker.start():
        progress.note(line)
    # Before the model is loaded, which ZeRO-3 shards as it is: transformers finds it by the settings' being there.
    config = deepspeed_config.deepspeed_config(spec, run, data.source)
    config = deepspeed_config.config_to_resume(spec, run, start, ranks, config)
    settings = objective.trainer_settings(run, steps, list(tracker.report_to), config)
    model = _load_model(spec, data, process)

    push = CheckpointPush(run, spec.push, progress.note)
    noted = {"processes": ranks.world, "stage": spec.deepspeed.name, **data.fingerprints}
    sealer = CheckpointSealer(run, ranks, spec.train.keep_checkpoints, process.heartbeat, push.enqueue, noted)
    guard = LossGuard(spec.train, run, ranks, progress.note)
    trainer = objective.build_trainer(
        data.source, model, data.tokenizer, (data.train, data.held), args=settings, guard=guard, sealer=sealer
    )
    if spec.train.compile is True:
        number = compiled_layers.compile_layers(trainer.model, fixed_shapes=spec.train.packing)
        progress.note(f"Compiles {number} layers, with the first steps")
    metrics = MetricsWriter(trainer, run, progress, ranks.main, start, tracker)
    before_after = BeforeAfter(trainer, objective, data.examples, spec, run, progress, process.heartbeat)
    if ranks.main:
        model_saving.keep_initial_adapter(spec, trainer.model, run)
    _say_what_trains(spec, trainer.model, progress)
    if ranks.main:
        facts = _environment(spec, trainer.model, data.source, data.fingerprints)
        counted = row_statistics(data.train, len(data.examples.held or ()))
        run.write("environment.json", {**facts, "processes": ranks.world, "data": counted})
    return Setup(spec, data, start, steps, trainer, metrics, before_after, tracker, sealer, push, peaks)


def _resume_step(process: Process) -> int:
    """Step of the newest complete checkpoint, 0 without one. Whatever the run wrote after it is removed."""
    run, ranks = process.run, process.ranks
    step: int = ranks.broadcast((checkpoints.newest(run, process.progress.note) or 0) if ranks.main else 0)
    if ranks.main:
        checkpoints.discard(run, [later for later in checkpoints.steps(run) if later > step])
        run.cut_after(step)
    if step:
        process.progress.note(f"Resumes after step {step}")
    ranks.barrier()
    return step


def _load_data(objective: Objective[Any], process: Process, start: int) -> Data:
    """Rows read and tokenised: by the main process, the others find them in the cache."""
    spec, progress = objective.spec, process.progress
    examples = preload.taken(preload.ROWS, spec, process.run) or objective.read()
    if examples.note:
        progress.note(examples.note)
    with process.ranks.main_first(process.heartbeat.beat) as working:

        def count(done: int, total: int) -> None:
            """Show progress, and beat."""
            progress.advance(done, total)
            working()

        source = model_loading.source_of(spec.model, progress.note)
        tokenizer = model_loading.load_tokenizer(spec, source)
        with progress.stage("Tokenising", "rows"):
            train, held = objective.tokenise_all(examples, tokenizer, count)
    progress.note(describe_rows(train, len(examples.held or ())))
    if spec.eval.every_steps and (held is None or not len(held.rows)):
        raise RequestError(nothing_held_out(spec))
    found = {
        "data_fingerprint": examples.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    if process.ranks.main:
        _check_fingerprints(spec, process.run, found, start)
    return Data(examples, source, tokenizer, train, held, found)


def _check_fingerprints(spec: RunSpec, run: RunDir, found: dict[str, str], step: int) -> None:
    """RequestError where the checkpoint was trained on other rows, or with another tokenizer."""
    known = checkpoints.facts(checkpoints.folder(run, step))
    changed = [what for key, what in FINGERPRINTS.items() if key in known and known[key] != found[key]]
    if step and changed and spec.run.on_changed_inputs == "stop":
        remedy = "restore them, or write run.on_changed_inputs=continue to use the new content"
        what = f"{' and '.join(changed)} are not those of the first {step} steps"
        raise RequestError(Problem(what, "resume", remedy))


def _load_model(spec: RunSpec, data: Data, process: Process) -> PreTrainedModel:
    """The model that trains, without its adapter; its generation config can be saved and stops at the end of a turn."""
    note, tokenizer = process.progress.note, data.tokenizer
    loaded = preload.taken(preload.WEIGHTS, spec, process.run)
    model = model_loading.load_to_train(spec, data.source, tokenizer, loaded)
    if line := model_loading.another_attention(spec, model):
        note(line)
    if line := model_saving.fix_generation_config(model):
        note(line)
    if data.train.num_conversations and (added := stop_tokens.align(model, tokenizer, save=True)):
        note(f"Stops   at {' and '.join(added)}, too, where the chat template ends a turn; saved with the model")
    trainable_weights.mark_trainable(spec, model)
    return model


def _say_what_trains(spec: RunSpec, model: PreTrainedModel, progress: Progress) -> None:
    trainable, total, lines = trainable_weights.describe_trainable(model)
    progress.note(f"Trains  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    shown = lines if len(lines) <= 8 else [*lines[:7], f"and {len(lines) - 7} more"]
    progress.note("        " + ", ".join(shown))
    if line := trainable_weights.wrong_formula(spec, model):
        progress.note(line)


def _environment(spec: RunSpec, model: PreTrainedModel, source: str, found: dict[str, str]) -> dict[str, Any]:
    """Facts for `environment.json`; `found` are the fingerprints."""
    return {
        "runner": __version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "num_threads": torch.get_num_threads(),
        "model_source": source,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "attention": model.config._attn_implementation,
        "attention_kernel": varlen_attention.kernel(model, spec.train.precision),
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "liger": kernels.liger(spec),
        "compiled_layers": spec.train.compile is True,
        **found,
        "seed": spec.train.seed,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Output of git in the project's own checkout; None without one."""
    if not (ASSETS / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ASSETS, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
