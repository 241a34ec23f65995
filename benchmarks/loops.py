"""The training loops that are compared: our worker as it is, and a bare one written by hand.

`python -m benchmarks.loops worker|bare RUN_DIR DESCRIPTOR`, started by benchmarks/turns.py; 1 is standard output.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional
from transformers import set_seed

from benchmarks.turns import Finished, Step, Turns
from runner.data.load import load_examples
from runner.data.loss_mask import IGNORED
from runner.report.progress import Progress
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import adapter_config, model_loading, trainable_weights
from runner.train.__main__ import quiet_libraries
from runner.train.objectives.sft import UnguardedSftTrainer, sft_config
from runner.train.tokens import token_dataset
from runner.train.trainers.stop_on_signal import StopOnSignal
from runner.train.trainers.trainer_settings import autocast, shared_settings
from runner.train.worker import work


class TakingTurns(StopOnSignal):
    """Handed to the worker in place of its signal handler: holds it between its steps.

    The worker's own callbacks come before it, so that a step's time holds their work too.
    """

    def __init__(self, run: RunDir, turns: Turns) -> None:
        super().__init__()
        self.run, self.turns = run, turns

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turns.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        seconds = self.turns.elapsed()
        *_, line = self.run.metrics()
        tokens, positions = (
            round(line[key] * line["step_seconds"]) for key in ("effective_tokens_per_second", "tokens_per_second")
        )
        self.turns.step_done(Step(seconds, line["loss"], tokens, positions))


def worker(spec: RunSpec, run: RunDir, turns: Turns) -> None:
    """The run itself, from `runner.train`."""
    work(spec, run, Progress(Console(quiet=True)), TakingTurns(run, turns))


def bare(spec: RunSpec, run: RunDir, turns: Turns) -> None:
    """What one would write by hand in plain torch, knowing what we know, for exactly this run.

    Same model, adapter, batches and arithmetic; nothing is counted, logged or checked.
    """
    assert spec.hw.num_cpus and spec.train.accumulation_steps == 1 and spec.train.schedule == "cosine"
    torch.set_num_threads(spec.hw.num_cpus)
    set_seed(spec.train.seed)
    model, batches, total_steps, warmup_steps = _parts(spec, run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=spec.train.learning_rate, weight_decay=spec.train.weight_decay, fused=True
    )

    def share(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    turns.begin()
    for batch in batches:
        optimizer.zero_grad()
        with autocast(spec):
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        torch.nn.utils.clip_grad_norm_(trained, spec.train.max_grad_norm)
        optimizer.step()
        schedule.step()
        turns.step_done(Step(turns.elapsed(), loss.item(), *count(batch)))


def count(batch: dict[str, Any]) -> tuple[int, int]:
    """Tokens and positions; in a packed batch all padding, and each first token, is at position 0 without a label."""
    size = batch["input_ids"].numel()
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum()), size
    starts = batch["position_ids"] == 0
    padding = starts & functional.pad(starts[:, 1:], (0, 1), value=True)  # no second token follows
    return size - int(padding.sum()), size


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; the head (21% of SmolLM2's weights) sees no other position."""
    causal = model.get_base_model()
    backbone, head = causal.get_decoder(), causal.get_output_embeddings()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[:, :-1]  # [b, s-1, d]
    labels = batch["labels"][:, 1:]  # [b, s-1]
    labelled = labels != IGNORED
    return functional.cross_entropy(head(hidden[labelled]).float(), labels[labelled])


def _parts(spec: RunSpec, run: RunDir) -> tuple[Any, Iterator[dict[str, Any]], int, int]:
    """Model with its adapter, batches without end, steps and warm-up steps: built as the worker builds them.

    A trainer is made for its data loader and its adapter, which its seed decides, and never trains.
    """
    examples, _ = load_examples(spec.data, spec.train.seed)
    source = model_loading.source_of(spec.model)
    tokenizer = model_loading.load_tokenizer(spec, source)
    rows = token_dataset.tokenise(examples, tokenizer, spec).rows
    model = model_loading.load_model(spec, source)
    trainable_weights.mark_trainable(spec, model)
    steps = spec.train.num_steps(len(rows), spec.hw.world_size)
    trainer = UnguardedSftTrainer(
        model=model,
        args=sft_config(spec, shared_settings(spec, run, steps, [])),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter_config.adapter_config(spec, model),
    )
    return trainer.model, _endless(trainer.get_train_dataloader()), steps, int(trainer.args.warmup_steps)


def _endless(loader: Any) -> Iterator[dict[str, Any]]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def main(kind: str, run_dir: str, answers: str) -> None:
    """One loop, until there are no more turns."""
    turns = Turns(int(answers))
    run = RunDir(Path(run_dir))
    spec = run.spec
    quiet_libraries(run.path / "logs" / "rank0.log")
    with suppress(Finished):
        {"worker": worker, "bare": bare}[kind](spec, run, turns)


if __name__ == "__main__":
    main(*sys.argv[1:])
