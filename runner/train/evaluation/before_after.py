"""Measurements before and after training: held-out loss and exact answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from runner.data.chat_tokenizer import ChatTokenizer
from runner.report.progress import Progress
from runner.rundir.directory import RunDir, write_atomically
from runner.spec import RunSpec
from runner.train import stop_tokens
from runner.train.evaluation import baseline
from runner.train.evaluation.baseline import Baseline, Measurement
from runner.train.evaluation.generation import Answer, compare_answers, generate, learned_answer
from runner.train.heartbeat import Heartbeat
from runner.train.trainers.recording_trainer import RecordingTrainerMixin
from runner.train.trainers.trainer_settings import autocast

if TYPE_CHECKING:
    from runner.train.objectives.objective import Examples, Objective

ANSWERS = "answers_{}.jsonl"
PACE = ("_runtime", "_per_second")
"""Ends of the names under which the trainer logs how long a measurement took."""
MOST = 700.0
"""Largest loss of which a perplexity can be written down."""


class BeforeAfter:
    """The same measurements before and after training; every process answers its share of the prompts."""

    def __init__(
        self, trainer: RecordingTrainerMixin, objective: Objective[Any], examples: Examples, spec: RunSpec, run: RunDir,
        progress: Progress, heartbeat: Heartbeat,
    ) -> None:  # fmt: skip
        self.trainer, self.spec, self.run, self.progress, self.heartbeat = trainer, spec, run, progress, heartbeat
        self.ranks, self.tokenizer = trainer.ranks, trainer.processing_class
        self.objective, self.judge = objective, objective.judge(examples)
        self.prompts = examples.prompts[: spec.eval.num_prompts]
        self.first: Measurement = {}
        """The measurement before training."""
        self.logged: dict[str, float] | None = None
        """Metrics of the trainer's last measurement of the held-out loss."""

    def before(self, check: Callable[[], None]) -> None:
        """Measure before training, unless an earlier part of the run or another run of the sweep has. `check` is called
        unless another run has passed it."""
        known = self.ranks.broadcast(self.run.read("before.json"))
        file = baseline.baseline_file(self.spec, self.run) if self.ranks.main and not known else None
        shared = self.ranks.broadcast(baseline.read(file) if file is not None else None)
        if shared is not None:
            self.first = self._adopt(shared)
        else:
            check()
            with baseline.random_state_kept():
                self.first = known or self.measure("before")
        if self.ranks.main and not known:
            self.run.write("before.json", self.first)
        if file is not None and shared is None:
            answers = self.run.path / ANSWERS.format("before")
            said = answers.read_text("utf-8") if answers.is_file() else None
            content: Baseline = {"run": self.run.id, "result": self.first, "logged": self.logged, "answers": said}
            baseline.write(file, content)

    def _adopt(self, shared: Baseline) -> Measurement:
        """Write and log another run's measurement as this one's own."""
        result = shared["result"]
        if self.ranks.main:
            self.run.set_status("evaluating", when="before")
            if shared["answers"] is not None:
                write_atomically(self.run.path / ANSWERS.format("before"), shared["answers"])
        if shared["logged"] is not None:
            self.trainer.replay_evaluation(shared["logged"])
        if result:
            self.progress.note(f"{'Before':8}{describe(result)} (measured by {shared['run']})")
        return result

    def repeat_interrupted(self, step: int) -> None:
        """Repeat the measurement after the step that the run resumes from, if a signal interrupted it."""
        every = self.spec.eval.every_steps
        due = every and (step % every == 0 or step >= self.trainer.state.max_steps)
        if due and self.ranks.broadcast(all(line["step"] != step for line in self.run.evals())):
            self.heartbeat.beat("evaluating")
            self.trainer.repeat_evaluation()

    def measure(self, when: Literal["before", "after"]) -> Measurement:
        """Measure held-out loss, exact matches and rewards; answers go to `answers_<when>.jsonl`."""
        self.heartbeat.beat("evaluating")
        if self.ranks.main:
            self.run.set_status("evaluating", when=when)
        result: Measurement = {}
        if self.trainer.eval_dataset is not None:
            found = self.trainer.evaluate()
            self.logged = {k: v for k, v in found.items() if k != "epoch" and not k.endswith(PACE)}
            result |= {"loss": float(found["eval_loss"]), **self.trainer.own_metrics(found, "eval_")}
            if self.objective.per_token_loss:
                result["perplexity"] = math.exp(min(result["loss"], MOST))
        if self.prompts:
            words = ChatTokenizer.of(self.tokenizer)
            stops = stop_tokens.stop_ids(getattr(self.trainer.model, "generation_config", None), self.tokenizer)
            learned = partial(learned_answer, words, self.tokenizer, stops)
            rows = compare_answers(self.prompts, self._answers(when), learned)
            known = [row for row in rows if row["expected"] is not None]
            if self.ranks.main:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_atomically(self.run.path / ANSWERS.format(when), text)
            if known:
                exact = sum(row["exact"] for row in known)
                result |= {"exact_match": exact / len(known), "num_exact": exact, "num_prompts": len(known)}
            result["num_endless"] = sum(not row["stopped"] for row in rows)
            if self.judge is not None:
                result |= self.judge([row["answer"] for row in rows])
        if result:
            self.progress.note(f"{when.capitalize():8}" + describe(result))
        return result

    def _answers(self, when: Literal["before", "after"]) -> list[Answer]:
        """One answer per prompt. Prompts are dealt out in turn, equally many to each process."""
        ranks, total = self.ranks, len(self.prompts)
        each = -(-total // ranks.world)
        own = [self.prompts[(i * ranks.world + ranks.rank) % total] for i in range(each)]

        def told(done: int) -> None:
            self.heartbeat.beat()
            self.progress.advance(min(done * ranks.world, total), total)

        with self.progress.stage(f"Answering {total} held-out prompts {when} training", "prompts", total):
            answers = generate(
                self.trainer.model,
                self.tokenizer,
                [e.prompt for e in own],
                tools=[e.tools for e in own],
                max_new_tokens=self.spec.eval.max_new_tokens,
                batch_size=self.spec.eval.batch_size,
                autocast=autocast(self.spec),
                on_batch=told,
                sharded=self.trainer.is_deepspeed_enabled and self.spec.deepspeed.name.startswith("zero3"),
            )
        dealt = ranks.all_gather(answers)
        return [dealt[i % ranks.world][i // ranks.world] for i in range(total)]


def describe(result: Measurement) -> str:
    """A measurement as a line of text."""
    parts = []
    if "exact_match" in result:
        parts.append(f"{result['num_exact']} of {result['num_prompts']} held-out prompts answered exactly")
    if result.get("num_endless"):
        parts.append(f"{result['num_endless']} not stopped within eval.max_new_tokens")
    if "loss" in result:
        parts.append(f"held-out loss {result['loss']:.4f}")
    if "reward" in result and "reward_accuracy" not in result:
        parts.append(f"reward {result['reward']:.3f} of greedy answers")
    if "reward_accuracy" in result:
        parts.append(f"the better answer preferred in {result['reward_accuracy']:.0%}")
    if "reward_margin" in result:
        parts.append(f"margin {result['reward_margin']:.4g}")
    return ", ".join(parts)
