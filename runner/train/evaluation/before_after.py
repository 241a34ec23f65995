"""Measurements before and after training: held-out loss and exact answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.load import Example
from runner.report.progress import Progress
from runner.rundir.directory import RunDir, write_atomically
from runner.spec import RunSpec
from runner.train import stop_tokens
from runner.train.distributed import Ranks
from runner.train.evaluation import baseline
from runner.train.evaluation.generation import Answer, compare, generate, learned_answer
from runner.train.heartbeat import Heartbeat
from runner.train.trainer import autocast

ANSWERS = "answers_{}.jsonl"
PACE = ("_runtime", "_per_second")
"""Ends of the names under which the trainer logs how long a measurement took."""
MOST = 700.0
"""Largest loss of which a perplexity can be written down."""


class Measuring:
    """The same questions before and after; every process answers its share of them."""

    trainer: Any
    """A TRL trainer with `RecordingTrainerMixin`."""

    def __init__(
        self, spec: RunSpec, run: RunDir, progress: Progress, ranks: Ranks, tokenizer: Any,
        asked: Sequence[Example], pulse: Heartbeat, judge: Callable[[list[str]], dict[str, float]] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.run, self.progress, self.ranks, self.pulse = spec, run, progress, ranks, pulse
        self.tokenizer, self.judge = tokenizer, judge
        self.asked = asked[: spec.eval.num_prompts]
        self.first: dict[str, Any] = {}
        self.logged: dict[str, float] | None = None
        """What the trainer has logged of the last measurement of the held-out loss."""

    def before(self, check: Callable[[], None]) -> None:
        """Measure, unless an earlier part of the same run has, or another run of the sweep; `check` is called where the
        latter has not: it passed there."""
        known = self.ranks.from_main(self.run.read("before.json"))
        file = baseline.file_of(self.spec, self.run) if self.ranks.main and not known else None
        shared = self.ranks.from_main(baseline.read(file) if file is not None else {})
        if shared:
            self.first = self._taken_over(shared)
        else:
            check()
            with baseline.random_state_kept():
                self.first = known or self.measure("before")
        if self.ranks.main and not known:
            self.run.write("before.json", self.first)
        if file is not None and not shared:
            answers = self.run.path / ANSWERS.format("before")
            said = answers.read_text("utf-8") if answers.is_file() else None
            content = {"run": self.run.id, "result": self.first, "logged": self.logged, "answers": said}
            baseline.write(file, content)

    def _taken_over(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Another run's measurement, written and logged as this one's own."""
        result: dict[str, Any] = shared["result"]
        if self.ranks.main:
            self.run.set_status("evaluating", when="before")
            if shared["answers"] is not None:
                write_atomically(self.run.path / ANSWERS.format("before"), shared["answers"])
        if shared["logged"] is not None:
            self.trainer.replay_evaluation(shared["logged"])
        if result:
            self.progress.note(f"{'Before':8}{describe(result)} (measured by {shared['run']})")
        return result

    def make_up(self, step: int) -> None:
        """The measurement after the step that the run goes on after, if a signal cut it short."""
        every = self.spec.eval.every_steps
        due = every and (step % every == 0 or step >= self.trainer.state.max_steps)
        if due and self.ranks.from_main(all(line["step"] != step for line in self.run.evals())):
            self.pulse.beat("evaluating")
            self.trainer.measure_again()

    def measure(self, when: str) -> dict[str, Any]:
        """Held-out loss and exact match; the answers go to `answers_<when>.jsonl`."""
        self.pulse.beat("evaluating")
        if self.ranks.main:
            self.run.set_status("evaluating", when=when)
        result: dict[str, Any] = {}
        if self.trainer.eval_dataset is not None:
            found = self.trainer.evaluate()
            self.logged = {k: v for k, v in found.items() if k != "epoch" and not k.endswith(PACE)}
            result |= {"loss": float(found["eval_loss"]), **self.trainer.measured(found, "eval_")}
            if self.spec.objective.name in ("sft", "pretrain"):  # whose loss is one of words
                result["perplexity"] = math.exp(min(result["loss"], MOST))
        if self.asked:
            words = ChatTokenizer.of(self.tokenizer)
            stops = stop_tokens.ids_of(getattr(self.trainer.model, "generation_config", None), self.tokenizer)
            learned = partial(learned_answer, words, self.tokenizer, stops)
            rows = compare(self.asked, self._answers(when), learned)
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

    def _answers(self, when: str) -> list[Answer]:
        """One per prompt; prompts are dealt out in turn, and all processes get equally many."""
        ranks, total = self.ranks, len(self.asked)
        each = -(-total // ranks.world)
        own = [self.asked[(i * ranks.world + ranks.rank) % total] for i in range(each)]

        def told(done: int) -> None:
            self.pulse.beat()
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
        dealt = ranks.gather(answers)
        return [dealt[i % ranks.world][i // ranks.world] for i in range(total)]


def describe(result: dict[str, Any]) -> str:
    """A measurement in words."""
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
