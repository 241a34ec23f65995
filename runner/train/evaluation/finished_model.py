"""Evaluation of a finished model: held-out loss and perplexity, and lm-eval's benchmarks."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch.nn import functional

from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir
from runner.spec import DataSpec, Pretrain, RunSpec, Sft
from runner.train import inference_spec
from runner.train.artifact_verbs import Say
from runner.train.chat import load
from runner.train.evaluation.before_after import MOST
from runner.train.objectives import build_trainer
from runner.train.objectives.registry import objective_of
from runner.train.trainer import autocast

IGNORED = -100  # torch's cross_entropy leaves these labels out


def evaluation(spec: RunSpec, run: RunDir, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """What was measured, also written to `eval.json`."""
    began = time.monotonic()
    spec = inference_spec.here(spec, say)
    model, tokenizer = load(spec, run, base=options.base)
    model.eval()
    facts: dict[str, Any] = {"run_id": run.id, "model": "base" if options.base else "tuned"}
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


def held_out(spec: RunSpec, model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Loss per learned token of the run's held-out rows, or of all rows in `--data`, each row by itself."""
    if not isinstance(spec.objective, (Sft, Pretrain)):
        what = f"objective={spec.objective.name} has no loss of words"
        raise RequestError(Problem(what, None, "name benchmarks with --tasks; summary.json has its held-out metrics"))
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"packing": False})})
    if options.data:
        spec = _on(spec, str(options.data))
    objective = objective_of(spec)
    examples = objective.read()
    rows = build_trainer.tokenise(objective, examples, tokenizer)[0 if options.data else 1]
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


def _on(spec: RunSpec, path: str) -> RunSpec:
    """All rows of a file, read as the run's own."""
    update: dict[str, Any] = {"source": "file", "path": path, "sources": [], "eval_path": None, "eval_fraction": 0.0,
              "max_examples": None}  # fmt: skip
    data = DataSpec.model_validate(spec.data.model_dump() | update)
    objective = spec.objective
    if isinstance(objective, Pretrain):
        objective = objective.model_copy(update={"experiment": None})
    return spec.model_copy(update={"data": data, "objective": objective})


def benchmarks(spec: RunSpec, model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
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
    shown = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=spec.eval.batch_size, max_length=spec.train.max_length
    )
    with autocast(spec):
        found = simple_evaluate(shown, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=1000)
    assert found is not None
    return {task: _figures(figures) for task, figures in found["results"].items()}


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """`acc,none` → `acc`."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if "," in name}
