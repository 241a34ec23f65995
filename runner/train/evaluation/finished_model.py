"""Evaluation of a finished model: held-out loss and perplexity, and lm-eval's benchmarks."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch.nn import functional

from runner.data.loss_mask import IGNORED
from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import open_model
from runner.train.artifact_verbs import Say
from runner.train.evaluation.before_after import MOST
from runner.train.objectives import objective_of
from runner.train.open_model import load_finished
from runner.train.trainers.trainer_settings import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HeldOut(TypedDict):
    """Next-token loss of rows, each by itself."""

    loss: float
    perplexity: float
    rows: int
    tokens: int
    """Learned tokens, over which the loss is a mean."""


class Evaluation(TypedDict, total=False):
    """`eval.json`, and the JSON of `eval`."""

    run_id: str
    model: Literal["base", "tuned"]
    held_out: HeldOut
    tasks: dict[str, dict[str, float]]
    """lm-eval's figures by task."""
    seconds: float


def evaluation(spec: RunSpec, run: RunDir, options: argparse.Namespace, say: Say) -> Evaluation:
    """Evaluate a finished run's model or its base; also written to `eval.json`."""
    began = time.monotonic()
    spec = open_model.local_spec(spec, say)
    model, tokenizer = load_finished(spec, run, base=options.base)
    model.eval()
    facts: Evaluation = {"run_id": run.id, "model": "base" if options.base else "tuned"}
    if options.data or not options.tasks:
        facts["held_out"] = held_out(spec, model, tokenizer, options)
        loss, perplexity = facts["held_out"]["loss"], facts["held_out"]["perplexity"]
        say(f"Loss    {loss:.4f}, perplexity {perplexity:.4g}, over {facts['held_out']['tokens']:,} tokens")
    if options.tasks:
        facts["tasks"] = benchmarks(spec, model, tokenizer, options)
        for task, figures in facts["tasks"].items():
            said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if "stderr" not in name)
            say(f"{task}: {said}")
    facts["seconds"] = time.monotonic() - began
    run.write("eval.json", facts)
    return facts


def held_out(
    spec: RunSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> HeldOut:
    """Loss per learned token of the run's held-out rows, or of all rows in `--data`, each row by itself."""
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"packing": False})})
    objective = objective_of(spec)
    if not objective.per_token_loss:
        what = f"objective={spec.objective.name} has no loss of words"
        raise RequestError(Problem(what, None, "name benchmarks with --tasks; summary.json has its held-out metrics"))
    if options.data:
        objective = objective_of(objective.reading(options.data))
    examples = objective.read()
    rows = objective.tokenise_all(examples, tokenizer)[0 if options.data else 1]
    if rows is None:
        raise RequestError(Problem("the run held no rows out", None, "name some with --data"))
    total, count = 0.0, 0
    chosen = rows.rows if options.limit is None else rows.rows.select(range(min(options.limit, len(rows.rows))))
    for row in chosen:
        ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
        with torch.inference_mode(), autocast(spec):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"))
        count += int((labels[0, 1:] != IGNORED).sum())
    loss = total / max(1, count)
    return {"loss": loss, "perplexity": math.exp(min(loss, MOST)), "rows": len(chosen), "tokens": count}


def benchmarks(
    spec: RunSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """lm-eval's figures by task; RequestError for a task that it does not know."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=str(options.tasks_dir) if options.tasks_dir else None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        remedy = "lm-eval ls tasks lists all; --tasks-dir names a folder with your own"
        raise RequestError(Problem(f"lm-eval has no task {unknown[0]}", "--tasks", remedy))
    sizes = {"batch_size": spec.eval.batch_size, "max_length": spec.train.max_length}
    shown = HFLM(pretrained=model, tokenizer=tokenizer, **sizes)
    with autocast(spec):
        found = simple_evaluate(shown, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=1000)
    assert found is not None
    return {task: _figures(figures) for task, figures in found["results"].items()}


def _figures(figures: Mapping[str, float | str]) -> dict[str, float]:
    """lm-eval's names without the filter: `acc,none` → `acc`."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if "," in name}
