"""TRL's GRPO trainer, with guards and records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from datasets import Features, Json
from trl import GRPOConfig, GRPOTrainer

from runner import spec as schema
from runner.data import load
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, PromptExample, Turn
from runner.data.tokenize_rows import TOOLS, PreferenceSettings
from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.train import row_ids
from runner.train.evaluation.generation import plain
from runner.train.guarded_trainer import LossGuardMixin
from runner.train.model_loading import DTYPES
from runner.train.objectives import reward_functions
from runner.train.objectives.objective import Examples
from runner.train.objectives.pairs import Compared


class GrpoTrainer(LossGuardMixin, GRPOTrainer):  # type: ignore[misc]  # trl has no types
    """A "batch" here is a list of rows: what is computed is known only when they have been answered."""

    METRICS = {  # noqa: RUF012  # as in LossGuardMixin, read only
        "reward": "reward",
        "reward_std": "reward_std",
        "kl": "kl",
        "entropy": "entropy",
        "completions/mean_length": "completion_tokens",
        "completions/clipped_ratio": "completion_cut",
        "frac_reward_zero_std": "groups_alike",
    }

    row_tools: Sequence[list[dict[str, Any]] | None] = ()
    """Of each row of the batch at hand."""

    def _watch_rows(self) -> None:
        """Rows come as they are, with their numbers in them."""

    def _taken_rows(self, inputs: Any) -> list[int]:
        """Of the whole generation batch that the micro batch is a part of; reward functions do not get them."""
        return [example.pop(row_ids.COLUMN) for example in inputs]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """As TRL, with the tools of each row in its prompt; they are kept apart from what reward functions get."""
        self.row_tools = [example.pop(TOOLS, None) or None for example in inputs]
        with plain(self.accelerator.unwrap_model(self.model), self.processing_class):
            return super()._generate_and_score_completions(inputs)

    @cached_property
    def words(self) -> ChatTokenizer:
        """What renders the prompts of evaluation as well."""
        return ChatTokenizer.of(self.processing_class)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL renders all with the same tools, which are functions it calls itself; here each row has its own."""
        given = self.row_tools or [None] * len(prompts)
        ids = [self.words.message_ids(turns, tools=tools or ()) for turns, tools in zip(prompts, given, strict=True)]
        return ids, None, {}

    def sizes(self, inputs: Any) -> tuple[int, int]:
        """Nothing yet: see `compute_loss`."""
        return 0, 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """With answers now: prompts [b, p] and completions [b, c] with their masks."""
        if model.training:
            masks = inputs["prompt_mask"], inputs["completion_mask"]
            self.positions += sum(mask.numel() for mask in masks)
            self.tokens += int(sum(mask.sum() for mask in masks))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def measured(self, logs: Any, prefix: str = "") -> dict[str, float]:
        """Also the mean of each reward function, by its name."""
        head, tail = f"{prefix}rewards/", "/mean"
        names = [name for name in logs if name.startswith(head) and name.endswith(tail)]
        own = {f"reward_{name.removeprefix(head).removesuffix(tail)}": logs[name] for name in names}
        return super().measured(logs, prefix) | {k: float(v) for k, v in own.items() if v is not None}


def narrow(trainer: GrpoTrainer, dtype: torch.dtype) -> None:
    """A reference of its own in the width of the arithmetic: TRL loads it as wide as the weights that train."""
    for parameter in [] if trainer.ref_model is None else trainer.ref_model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


class Grpo(Compared):
    """Prompts; the model answers, and reward functions judge."""

    trainer_class = GrpoTrainer

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.objective, schema.Grpo)
        self.asked_for = spec.objective

    def asked(self, held: Sequence[Any]) -> list[Example]:
        """Prompts with the row's answer, if it has one."""
        return [Example(row.prompt, _answer(row), tools=row.tools) for row in held if isinstance(row, PromptExample)]

    def judge(self, examples: Examples) -> Callable[[list[str]], dict[str, float]]:
        """The reward functions over the first `eval.num_prompts` held-out rows."""
        objective = self.asked_for
        functions, weights = (
            reward_functions.functions(objective),
            objective.reward_weights or [1.0] * len(objective.rewards),
        )
        asked = [row for row in examples.held or () if isinstance(row, PromptExample)][: self.spec.eval.num_prompts]

        def of(answers: list[str]) -> dict[str, float]:
            table = load.columns(asked)
            said = [[{"role": "assistant", "content": answer}] for answer in answers]
            found = {}
            for function in functions:
                values = function(prompts=table["prompt"], completions=said, completion_ids=None, **_rest(table))
                found[f"reward_{function.__name__}"] = sum(values) / len(values)
            return {"reward": sum(w * v for w, v in zip(weights, found.values(), strict=True)), **found}

        return of

    def row_settings(self) -> PreferenceSettings:
        """Answers are as long as the objective lets them become."""
        return PreferenceSettings(self.spec.train.max_length, self.asked_for.max_new_tokens, False)

    def features(self, rows: Sequence[Any]) -> Features:
        """Of questions the turns and the extra fields may be of any shape: Arrow's own columns would fill a tool call
        with the arguments of all others."""
        extra = dict.fromkeys(name for row in rows if isinstance(row, PromptExample) for name in row.extra)
        return Features({**dict.fromkeys(extra, Json()), "prompt": Json(), "answer": Json(), TOOLS: Json()})

    def num_steps(self, num_rows: int) -> int:
        """Each takes as many prompts as the batch has groups; RequestError for too few (TRL would train on none of
        them and say nothing)."""
        train = self.spec.train
        prompts = train.batch_size // self.asked_for.num_generations
        if num_rows < prompts:
            what = f"{num_rows} prompts, and a step takes {prompts}"
            remedy = "write a smaller train.batch_size, a larger objective.num_generations, or more rows"
            raise RequestError(Problem(what, "data", remedy))
        return train.max_steps or -(-int(train.num_epochs * (num_rows // prompts) * 1000) // 1000)

    def settings(self, shared: dict[str, Any]) -> GRPOConfig:
        """TRL's. One generation for each optimiser step: its answers are those of the model that learns from them."""
        objective = self.asked_for
        shared = {name: value for name, value in shared.items() if name != "max_length"}
        return GRPOConfig(
            **shared,
            num_generations=objective.num_generations,
            max_completion_length=objective.max_new_tokens,
            temperature=objective.temperature,
            beta=objective.beta,
            loss_type=objective.loss,
            epsilon=objective.clip,
            reward_weights=objective.reward_weights,
            disable_dropout=True,
        )

    def trainer(self, source: str, model: Any, adapter: Any, common: dict[str, Any]) -> GrpoTrainer:
        """With the reward functions; TRL loads a reference itself."""
        common["reward_funcs"] = reward_functions.functions(self.asked_for)
        common["eval_dataset"] = None  # the reward of greedy answers is what is measured (before_after.py)
        made: GrpoTrainer = self.trainer_class(model=model, peft_config=adapter, **common)
        narrow(made, DTYPES[str(self.spec.train.precision)])
        return made


def _rest(table: dict[str, Any]) -> dict[str, Any]:
    return {name: column for name, column in table.items() if name != "prompt"}


def _answer(row: PromptExample) -> list[Turn]:
    first = row.answer[0] if isinstance(row.answer, list) and row.answer else row.answer
    return [] if first is None else [{"role": "assistant", "content": str(first)}]
