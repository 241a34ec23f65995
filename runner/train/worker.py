"""The worker of a run: set up, train, measure, save."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from runner.errors import InterruptedRun, Problem
from runner.hub.model_card import write_card
from runner.report.loss_plot import plot_loss
from runner.report.progress import Progress
from runner.report.summary import summary_of
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.rundir.json_files import Summary
from runner.spec import RunSpec
from runner.train import model_saving, packing_isolation, trainable_weights
from runner.train.checkpoint_saving import SaveWhenDue
from runner.train.distributed import Ranks
from runner.train.heartbeat import Heartbeat
from runner.train.setup import Process, Setup, set_up
from runner.train.trainers.callbacks import AtTrainBegin, StopEarly
from runner.train.trainers.stop_on_signal import StopOnSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Finished:
    """A finished run in memory: for tests, and for whoever calls the worker from Python."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    summary: Summary
    """Empty in processes other than the main one."""


def work(
    spec: RunSpec, run: RunDir, progress: Progress, stop: StopOnSignal,
    ranks: Ranks | None = None, heartbeat: Heartbeat | None = None,
) -> Finished:  # fmt: skip
    """Do the whole run, or resume one that has checkpoints; this process's part, where there are several.

    Every state the run enters is in `status.json` before its work begins. RequestError for what turns out wrong only
    now, InterruptedRun for a run that was stopped with a checkpoint, Rewind and RunFailedError from the loss guard.
    """
    began = time.monotonic()
    ranks = ranks or Ranks()
    process = Process(run, progress, stop, ranks, heartbeat or Heartbeat(run, ranks.rank))
    spent = run.spent()  # by its earlier starts
    process.enter("loading", started=time.time(), spent=spent)
    setup = set_up(spec, process)
    train(setup, process)
    after = measure_after(setup)
    model = save(setup, process)
    summary: Summary = {}
    if ranks.main:
        summary = summarise(setup, process, after, spent + time.monotonic() - began)
    return Finished(model, setup.data.tokenizer, summary)


def train(setup: Setup, process: Process) -> None:
    """Train to the last step, and wait for its checkpoint; InterruptedRun where a signal has stopped it."""
    spec, trainer, start = setup.spec, setup.trainer, setup.start
    patience = spec.eval.early_stopping_patience
    callbacks = [
        setup.metrics,
        process.heartbeat,
        *([StopEarly(patience)] if patience else []),
        AtTrainBegin(partial(_before_first_step, setup, process)),
        process.stop,  # a signal before this ends the process at once: nothing is trained yet
        SaveWhenDue(setup.sealer, spec.train.save_every_minutes),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    with process.progress.stage("Training", "steps", setup.steps, start):
        trainer.train(resume_from_checkpoint=str(checkpoints.folder(process.run, start)) if start else None)
    setup.sealer.wait()
    setup.push.close()
    _raise_if_stopped(process, trainer.state.global_step)
    setup.peaks.end("train")


def _before_first_step(setup: Setup, process: Process) -> None:
    """Rehearse the save and measure the untrained model. Called by the trainer once DeepSpeed has its engine: before
    that a sharded model cannot answer."""
    spec, trainer, tokenizer = setup.spec, setup.trainer, setup.data.tokenizer
    setup.peaks.end("load")
    model_saving.check_room(spec, process.run, trainer, process.ranks)

    def check() -> None:
        """Check what an equal run of the same sweep need not check again: 0.4 s of CPU for SmolLM2."""
        model_saving.rehearse_save(spec, process.run, trainer, tokenizer, process.ranks)
        packing_isolation.check_isolation(spec, trainer, tokenizer)

    setup.before_after.before(check)
    if setup.start:
        trainer.follow_schedule()
        setup.before_after.repeat_interrupted(setup.start)
    setup.peaks.end("eval")
    trainer.peaks = setup.peaks
    process.enter("training", num_steps=setup.steps)


def _raise_if_stopped(process: Process, step: int) -> None:
    if not process.stop.finish_training():
        return
    if process.ranks.main:
        process.run.set_status("interrupted", exit_code=130, step=step)
    process.ranks.barrier()  # the checkpoint is sealed: now torchrun may end the others as soon as one has gone
    where = checkpoints.folder(process.run, step)
    remedy = f"python -m runner resume {quote(str(process.run.path))}"
    raise InterruptedRun(Problem(f"stopped after step {step}; checkpoint saved in {where}", None, remedy))


def measure_after(setup: Setup) -> dict[str, Any]:
    """Measure the trained model, in the precision in which it is saved."""
    if not setup.trainer.is_deepspeed_enabled:  # which has made 16 bits of its weights already
        trainable_weights.cast_to_saved_dtype(setup.spec, setup.trainer.model)
    result = setup.before_after.measure("after")
    setup.peaks.end("eval")
    return result


def save(setup: Setup, process: Process) -> PreTrainedModel:
    """Write `model/`; the model as it was saved."""
    process.enter("saving")
    trainer = setup.trainer
    model_saving.save_model(setup.spec, process.run, trainer, setup.data.tokenizer, process.ranks)
    setup.peaks.end("save")
    # Without accelerate's wrapper, whose autocast nobody sees.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def summarise(setup: Setup, process: Process, after: dict[str, Any], seconds: float) -> Summary:
    """Write `summary.json`, the plot and the model's card, and mark the run done; on the main process only."""
    spec, run, metrics, trainer = setup.spec, process.run, setup.metrics, setup.trainer
    trained = {
        "losses": metrics.losses,
        "steps": trainer.state.global_step,
        "tokens": metrics.tokens,
        "positions": metrics.positions,
        "seconds": metrics.total_seconds,
        "parameters": trainable_weights.describe_trainable(trainer.model)[:2],
        "examples": setup.data.train.num_examples,
    }
    summary = summary_of(spec, run, trained, setup.before_after.first, after, seconds, setup.peaks.as_dict())
    plot_loss(run, summary)
    run.write("summary.json", summary)
    setup.tracker.finish(summary)
    write_card(spec, run, run.path / "model")
    run.set_status("done", exit_code=0, step=trainer.state.global_step)
    setup.sealer.finish()
    return summary
