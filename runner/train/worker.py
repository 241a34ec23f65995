"""The worker of a run: load, measure, train, measure, save, summarise."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from runner.data.row_checks import nothing_held_out
from runner.errors import InterruptedRun, Problem, RequestError
from runner.hub.model_card import write_card
from runner.report.loss_plot import plot_loss
from runner.report.progress import Progress
from runner.report.summary import summary_of
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.rundir.json_files import State, StatusFacts, Summary
from runner.spec import RunSpec
from runner.train import (
    model_loading,
    packing_isolation,
    peft_methods,
    preload,
    pretraining_stages,
    save_rehearsal,
    stop_tokens,
    universal_checkpoint,
)
from runner.train.callbacks import AtStart, MetricsWriter, StopEarly, StopOnSignal
from runner.train.checkpoint_push import CheckpointPush
from runner.train.checkpointing import CheckpointSealer, SaveWhenDue
from runner.train.deepspeed_config import deepspeed_config
from runner.train.distributed import Ranks
from runner.train.evaluation.before_after import Measuring
from runner.train.heartbeat import Heartbeat
from runner.train.loss_guard import LossGuard
from runner.train.memory_stats import Peaks
from runner.train.objectives import build_trainer
from runner.train.objectives.registry import objective_of
from runner.train.run_environment import check_same, environment, fingerprints
from runner.train.token_cache import line_of
from runner.train.trackers import tracker_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class Finished:
    """What a run leaves in memory: for tests, and for whoever calls the worker from Python."""

    model: Any
    tokenizer: Any
    summary: Summary


def work(
    spec: RunSpec, run: RunDir, progress: Progress, stop: StopOnSignal,
    ranks: Ranks | None = None, pulse: Heartbeat | None = None,
) -> Finished:  # fmt: skip
    """Do the whole run, or go on with one that has checkpoints; this process's part, where there are several.

    Every state the run enters is in `status.json` before its work begins.
    """
    began = time.monotonic()
    ranks = ranks or Ranks()
    pulse = pulse or Heartbeat(run, ranks.rank)

    def enter(state: State, **facts: Unpack[StatusFacts]) -> None:
        pulse.beat(state)
        if ranks.main:
            run.set_status(state, **facts)

    spent = run.spent()  # by its earlier starts
    enter("loading", started=time.time(), spent=spent)
    start = _start(run, progress, ranks)
    peaks = Peaks(spec.hw.accelerator == "cuda")
    if spec.hw.accelerator == "cpu" and spec.hw.num_cpus:
        torch.set_num_threads(max(1, spec.hw.num_cpus // (spec.hw.num_processes or 1)))

    set_seed(spec.train.seed)
    spec = pretraining_stages.prepare(spec, progress.note, pulse.beat, ranks)
    objective = objective_of(spec)
    examples = preload.taken(preload.ROWS, spec, run) or objective.read()
    if examples.note:
        progress.note(examples.note)
    with ranks.main_first(pulse.beat) as working:

        def count(done: int, total: int) -> None:
            """Rows are tokenised: said, and a sign of life."""
            progress.advance(done, total)
            working()

        source = model_loading.source_of(spec.model, progress.note)
        tokenizer = model_loading.load_tokenizer(spec, source)
        with progress.stage("Tokenising", "rows"):
            rows = build_trainer.tokenise(objective, examples, tokenizer, count)
    progress.note(line_of(rows[0], len(examples.held or ())))
    if spec.eval.every_steps and (rows[1] is None or not len(rows[1].rows)):
        raise RequestError(nothing_held_out(spec))
    content = fingerprints(tokenizer, examples.fingerprint)
    if ranks.main:
        check_same(spec, run, content, start)
    steps = objective.num_steps(len(rows[0].rows))
    tracker = tracker_of(spec, run, progress.note, ranks.main)
    if line := tracker.start():
        progress.note(line)
    sharding = universal_checkpoint.prepare(spec, run, start, ranks, deepspeed_config(spec, run, source))
    arguments = build_trainer.settings(objective, run, steps, list(tracker.report_to), sharding)
    model = build_trainer.load_model(spec, source, tokenizer, preload.taken(preload.WEIGHTS, spec, run))
    if line := save_rehearsal.fix_generation_config(model):
        progress.note(line)
    if rows[0].num_conversations and (added := stop_tokens.align(model, tokenizer, save=True)):
        progress.note(
            f"Stops   at {' and '.join(added)}, too, where the chat template ends a turn; saved with the model"
        )
    peft_methods.mark_trainable(spec, model)
    metrics = MetricsWriter(run, progress, ranks.main, start, tracker)
    measuring = Measuring(spec, run, progress, ranks, tokenizer, examples.asked, pulse, objective.judge(examples))

    def begin() -> None:
        """Once DeepSpeed has its engine: before that a sharded model cannot answer."""
        peaks.end("load")
        save_rehearsal.rehearse(spec, run, trainer, tokenizer, ranks)
        measuring.before(lambda: packing_isolation.check(spec, trainer, tokenizer))
        if start:
            trainer.follow_schedule()
            measuring.make_up(start)
        peaks.end("eval")
        trainer.peaks = peaks
        enter("training", num_steps=steps)

    push = CheckpointPush(run, spec.push, progress.note)
    sealer = CheckpointSealer(run, ranks, spec.train.keep_checkpoints, pulse, push.offer)
    early = [StopEarly(spec.eval.early_stopping_patience)] if spec.eval.early_stopping_patience else []
    callbacks = [metrics, pulse, *early, AtStart(begin), stop, SaveWhenDue(sealer, spec.train.save_every_minutes)]
    guard = LossGuard(spec.train, run, ranks, progress.note)
    trainer: Any = build_trainer.build(
        objective, source, model, tokenizer, rows, args=arguments, guard=guard, callbacks=callbacks
    )
    trainer.ranks, trainer.sealer = ranks, sealer
    trainer.noted = {"processes": ranks.world, "stage": spec.deepspeed.name, **content}
    metrics.trainer = measuring.trainer = trainer
    if ranks.main:
        peft_methods.keep_initial_adapter(spec, trainer.model, run)
    _say_what_trains(spec, trainer.model, progress)
    facts = environment(spec, trainer.model, source, content)
    if ranks.main:
        run.write("environment.json", {**facts, "processes": ranks.world})

    with progress.stage("Training", "steps", steps, start):
        trainer.train(resume_from_checkpoint=str(checkpoints.folder(run, start)) if start else None)
    sealer.wait()
    push.close()
    _stop_if_asked(run, stop, trainer.state.global_step, ranks)
    peaks.end("train")

    if not trainer.is_deepspeed_enabled:  # which has made 16 bits of them already
        peft_methods.settle(spec, trainer.model)
    after = measuring.measure("after")
    peaks.end("eval")
    enter("saving")
    save(spec, run, trainer, tokenizer, ranks)
    peaks.end("save")
    # Without accelerate's wrapper, whose autocast nobody sees: the model as it was saved.
    finished = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if not ranks.main:
        return Finished(finished, tokenizer, {})
    trained = {
        "losses": metrics.losses,
        "steps": trainer.state.global_step,
        "tokens": metrics.tokens,
        "positions": metrics.positions,
        "seconds": metrics.total_seconds,
        "parameters": peft_methods.describe_trainable(trainer.model)[:2],
        "examples": rows[0].num_examples,
    }
    summary = summary_of(spec, run, trained, measuring.first, after, spent + time.monotonic() - began, peaks.as_dict())
    plot_loss(run, summary)
    run.write("summary.json", summary)
    tracker.finish(summary)
    write_card(spec, run, run.path / "model")
    run.set_status("done", exit_code=0, step=trainer.state.global_step)
    sealer.finish()
    return Finished(finished, tokenizer, summary)


def _start(run: RunDir, progress: Progress, ranks: Ranks) -> int:
    """Step after which to go on: that of the newest checkpoint that is whole, 0 without one. Later traces go."""
    step: int = ranks.from_main((checkpoints.newest(run, progress.note) or 0) if ranks.main else 0)
    if ranks.main:
        checkpoints.discard(run, [later for later in checkpoints.steps(run) if later > step])
        run.cut_after(step)
    if step:
        progress.note(f"Resumes after step {step}")
    ranks.barrier()
    return step


def _say_what_trains(spec: RunSpec, model: Any, progress: Progress) -> None:
    trainable, total, lines = peft_methods.describe_trainable(model)
    progress.note(f"Trains  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    shown = lines if len(lines) <= 8 else [*lines[:7], f"and {len(lines) - 7} more"]
    progress.note("        " + ", ".join(shown))
    if line := peft_methods.wrong_formula(spec, model):
        progress.note(line)


def _stop_if_asked(run: RunDir, stop: StopOnSignal, step: int, ranks: Ranks) -> None:
    if not stop.settle():
        return
    where = checkpoints.folder(run, step)
    if ranks.main:
        run.set_status("interrupted", exit_code=130, step=step)
    ranks.barrier()  # the checkpoint is sealed: now torchrun may end the others as soon as one has gone
    raise InterruptedRun(
        Problem(
            f"stopped after step {step}; checkpoint saved in {where}",
            None,
            f"python -m runner resume {quote(str(run.path))}",
        )
    )


def save(spec: RunSpec, run: RunDir, trainer: Any, tokenizer: Any, ranks: Ranks) -> None:
    """Write `model/` so that plain transformers (or peft, for an adapter) loads it; whole or not at all."""
    temporary, final = run.path / ".model.tmp", run.path / "model"
    state = None
    if trainer.is_deepspeed_enabled and spec.deepspeed.name.startswith("zero3"):
        trainer.deepspeed.empty_partition_cache()  # what was fetched ahead of its use: it cannot be gathered again
        state = peft_methods.whole_weights(spec, trainer.model, ranks.main)
    if ranks.main:
        shutil.rmtree(temporary, ignore_errors=True)
        trainer.model.config.use_cache = True  # training switched it off
        peft_methods.save_model(spec, trainer.model, temporary, run, state)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's, of a path and "More Information Needed"
        if peft_methods.adapter_of(spec):
            stop_tokens.save(temporary, tokenizer)
        shutil.rmtree(final, ignore_errors=True)  # of a run that was extended
        temporary.rename(final)
    ranks.barrier()
