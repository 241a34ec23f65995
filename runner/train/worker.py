"""One run from its spec to its model: load, measure, train, measure again, save, sum up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from runner.data.formats import Example, fingerprint, load
from runner.errors import InterruptedRun, Problem, RunFailedError
from runner.report.plot import plot_loss
from runner.report.progress import Progress
from runner.report.summary import summary_of
from runner.rundir import RunDir
from runner.spec import RunSpec
from runner.train import dataset, methods, models
from runner.train.callbacks import MarkComplete, MetricsWriter, StopOnSignal
from runner.train.environment import environment
from runner.train.evaluate import compare, generate
from runner.train.peaks import Peaks
from runner.train.tracking import start_tracking
from runner.train.trainer import CountingTrainer, autocast, num_steps, settings


@dataclass
class Finished:
    """What a run leaves in memory: for tests, and for whoever calls the worker from Python."""

    model: Any
    tokenizer: Any
    summary: dict[str, Any]


def work(spec: RunSpec, run: RunDir, progress: Progress, stop: StopOnSignal) -> Finished:
    """Do the whole run; every state it enters is in `status.json` before its work begins."""
    began = time.time()
    run.set_status("loading", started=began)
    peaks = Peaks(spec.hw.accelerator == "cuda")
    if spec.hw.accelerator == "cpu" and spec.hw.num_cpus:
        torch.set_num_threads(spec.hw.num_cpus)
    set_seed(spec.train.seed)
    train_examples, eval_examples = load(spec.data, spec.train.seed)
    source = models.source_of(spec.model, progress.note)
    tokenizer = models.load_tokenizer(spec, source)
    train_rows = dataset.tokenise(train_examples, tokenizer, spec)
    eval_rows = dataset.tokenise(eval_examples, tokenizer, spec) if eval_examples else None
    progress.note(_data_line(train_rows, len(eval_examples)))
    model = models.load_model(spec, source)
    methods.mark_trainable(spec, model)
    steps = num_steps(spec, len(train_rows.rows))
    report_to, line = start_tracking(spec, run)
    if line:
        progress.note(line)
    metrics = MetricsWriter(run, progress)
    trainer = _trainer(spec, run, model, tokenizer, train_rows, eval_rows, steps, report_to, [metrics, stop])
    metrics.trainer = trainer
    methods.keep_initial_adapter(spec, trainer.model, run)
    _say_what_trains(trainer.model, progress)
    facts = environment(spec, trainer.model, tokenizer, source, fingerprint([*train_examples, *eval_examples]))
    run.write("environment.json", facts)
    peaks.end("load")

    before = _measure(spec, run, "before", trainer, tokenizer, eval_examples, progress)
    peaks.end("eval")
    run.set_status("training", num_steps=steps)
    with progress.stage("Training", "steps"):
        trainer.train()
    _stop_if_asked(run, stop, trainer.state.global_step)
    _check_finite(metrics.losses)
    peaks.end("train")

    methods.settle(spec, trainer.model)
    after = _measure(spec, run, "after", trainer, tokenizer, eval_examples, progress)
    peaks.end("eval")
    run.set_status("saving")
    save(spec, run, trainer.model, tokenizer)
    peaks.end("save")
    trained = {
        "losses": metrics.losses,
        "steps": trainer.state.global_step,
        "tokens": metrics.tokens,
        "positions": metrics.positions,
        "seconds": metrics.total_seconds,
        "parameters": methods.describe_trainable(trainer.model)[:2],
        "examples": train_rows.num_examples,
    }
    summary = summary_of(spec, run, trained, before, after, time.time() - began, peaks.as_dict())
    plot_loss(run, summary)
    run.write("summary.json", summary)
    run.set_status("done", exit_code=0, step=trainer.state.global_step)
    # Without accelerate's wrapper, whose autocast nobody sees: the model as it was saved.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return Finished(model, tokenizer, summary)


def _trainer(
    spec: RunSpec, run: RunDir, model: Any, tokenizer: Any, train_rows: dataset.Tokenised,
    eval_rows: dataset.Tokenised | None, steps: int, report_to: list[str], callbacks: list[Any],
) -> CountingTrainer:  # fmt: skip
    if spec.eval.early_stopping_patience:
        callbacks = [*callbacks, EarlyStoppingCallback(spec.eval.early_stopping_patience)]
    trainer = CountingTrainer(
        model=model,
        args=settings(spec, run, steps, report_to),
        train_dataset=train_rows.rows,
        eval_dataset=eval_rows.rows if eval_rows else None,
        processing_class=tokenizer,
        peft_config=methods.adapter_config(spec, model),
        callbacks=[*callbacks, MarkComplete()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _data_line(rows: dataset.Tokenised, num_eval: int) -> str:
    parts = [f"{rows.num_examples:,} examples, {rows.num_tokens:,} tokens"]
    if rows.packing_efficiency is not None:
        parts.append(f"packed into {len(rows.rows):,} sequences, {rows.packing_efficiency:.0%} full")
    if rows.num_truncated:
        parts.append(f"{rows.num_truncated:,} cut to the longest length")
    if rows.num_dropped:
        parts.append(f"{rows.num_dropped:,} dropped: nothing left to learn after the cut")
    if num_eval:
        parts.append(f"{num_eval:,} held out")
    return "Data    " + "; ".join(parts) + (" (tokens from the cache)" if rows.from_cache else "")


def _say_what_trains(model: Any, progress: Progress) -> None:
    trainable, total, lines = methods.describe_trainable(model)
    progress.note(f"Trains  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    shown = lines if len(lines) <= 8 else [*lines[:7], f"and {len(lines) - 7} more"]
    progress.note("        " + ", ".join(shown))


def _measure(
    spec: RunSpec, run: RunDir, when: str, trainer: CountingTrainer, tokenizer: Any,
    examples: list[Example], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Held-out loss and exact match; the answers go to `answers_<when>.jsonl`."""
    import json

    from runner.rundir import write_atomically

    run.set_status("evaluating", when=when)
    result: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        result["loss"] = float(trainer.evaluate()["eval_loss"])
    asked = [e for e in examples if e.text is None][: spec.eval.num_prompts]
    if asked:
        with progress.stage(f"Answering {len(asked)} held-out prompts {when} training", "prompts"):
            answers = generate(
                trainer.model,
                tokenizer,
                [e.prompt for e in asked],
                max_new_tokens=spec.eval.max_new_tokens,
                batch_size=spec.eval.batch_size,
                autocast=autocast(spec),
                on_batch=lambda done: progress.advance(done, len(asked)),
            )
        rows = compare(asked, answers)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(run.path / f"answers_{when}.jsonl", text)
        result |= {
            "exact_match": sum(r["exact"] for r in rows) / len(rows),
            "num_exact": sum(r["exact"] for r in rows),
        }
        result["num_prompts"] = len(rows)
    if result:
        progress.note(f"{when.capitalize():8}" + describe(result))
    return result


def describe(result: dict[str, Any]) -> str:
    """A measurement in words."""
    parts = []
    if "exact_match" in result:
        parts.append(f"{result['num_exact']} of {result['num_prompts']} held-out prompts answered exactly")
    if "loss" in result:
        parts.append(f"held-out loss {result['loss']:.4f}")
    return ", ".join(parts)


def _stop_if_asked(run: RunDir, stop: StopOnSignal, step: int) -> None:
    if stop.received is None:
        return
    where = run.path / "checkpoints" / f"checkpoint-{step}"
    run.set_status("interrupted", exit_code=130, step=step)
    raise InterruptedRun(Problem(f"stopped after step {step}; checkpoint saved", None, str(where)))


def _check_finite(losses: list[float]) -> None:
    bad = next((i for i, loss in enumerate(losses) if loss != loss or abs(loss) == float("inf")), None)
    if bad is not None:
        raise RunFailedError(
            Problem(
                f"the loss became {losses[bad]} at step {bad + 1}",
                None,
                "lower train.learning_rate, or use train.precision=fp32",
            )
        )


def save(spec: RunSpec, run: RunDir, model: Any, tokenizer: Any) -> None:
    """Write `model/` so that plain transformers (or peft, for an adapter) loads it; whole or not at all."""
    temporary, final = run.path / ".model.tmp", run.path / "model"
    methods.save_model(spec, model, temporary, run)
    tokenizer.save_pretrained(temporary)
    temporary.rename(final)
