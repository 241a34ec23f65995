"""`objective=grpo`: the model answers prompts, reward functions judge the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from datasets import Features, Json
from trl import GRPOConfig, GRPOTrainer

from runner import spec as schema
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, PromptExample, Turn, columns
from runner.data.tokenize_rows import TOOLS, PreferenceSettings
from runner.errors import Problem, RequestError
from runner.train.evaluation.generation import greedy_generation_config
from runner.train.model_loading import DTYPES
from runner.train.objectives import reward_functions
from runner.train.objectives.objective import Examples, Rewards
from runner.train.objectives.preference import PreferenceObjective
from runner.train.trainers import guarded_trainer
from runner.train.trainers.guarded_trainer import LossGuardMixin

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from runner.data.examples import Learnable
    from runner.train.objectives.objective import TrainerParts
    from runner.train.trainers.recording_trainer import Batch, Loss, NumItems
    from runner.train.trainers.trainer_settings import SharedSettings


class GrpoTrainer(LossGuardMixin, GRPOTrainer):  # type: ignore[misc]  # trl has no types
    """A micro batch is a list of rows; its tokens are known only when they have been answered."""

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

    def _wrap_collator(self) -> None:
        """Keep TRL's collator: rows come as they are, with their ids."""

    def _pop_row_ids(self, inputs: Any) -> list[int]:
        """Remove them from the whole generation batch, so that reward functions do not get them."""
        return [example.pop(guarded_trainer.ROW_COLUMN) for example in inputs]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """As TRL, with the tools of each row in its prompt; they are kept apart from what reward functions get."""
        self.row_tools = [example.pop(TOOLS, None) or None for example in inputs]
        with greedy_generation_config(self.accelerator.unwrap_model(self.model), self.processing_class):
            return super()._generate_and_score_completions(inputs)

    @cached_property
    def words(self) -> ChatTokenizer:
        """The renderer of prompts, the same as in evaluation."""
        return ChatTokenizer.of(self.processing_class)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL renders all with the same tools, which are functions it calls itself; here each row has its own."""
        given = self.row_tools or [None] * len(prompts)
        ids = [self.words.message_ids(turns, tools=tools or ()) for turns, tools in zip(prompts, given, strict=True)]
        return ids, None, {}

    def sizes(self, inputs: Batch) -> tuple[int, int]:
        """0 until the rows are answered: see `compute_loss`."""
        return 0, 0

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Loss:
        """With answers now: prompts [b, p] and completions [b, c] with their masks."""
        if model.training:
            masks = inputs["prompt_mask"], inputs["completion_mask"]
            self.positions += sum(mask.numel() for mask in masks)
            self.tokens += sum(mask.sum() for mask in masks)
        found: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return found

    def own_metrics(self, logs: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
        """With the mean of each reward function, by its name."""
        head, tail = f"{prefix}rewards/", "/mean"
        names = [name for name in logs if name.startswith(head) and name.endswith(tail)]
        own = {f"reward_{name.removeprefix(head).removesuffix(tail)}": logs[name] for name in names}
        return super().own_metrics(logs, prefix) | {k: float(v) for k, v in own.items() if v is not None}


def cast_reference(trainer: GrpoTrainer, dtype: torch.dtype) -> None:
    """Cast the reference model to the compute dtype: TRL loads it as wide as the weights that train."""
    for parameter in [] if trainer.ref_model is None else trainer.ref_model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


class Grpo(PreferenceObjective[schema.Grpo]):
    """Group relative policy optimisation (arXiv 2402.03300)."""

    trainer_class = GrpoTrainer

    def prompts(self, held: Sequence[Learnable]) -> list[Example]:
        """Prompts with the row's answer, if it has one."""
        return [Example(row.prompt, _answer(row), tools=row.tools) for row in held if isinstance(row, PromptExample)]

    def judge(self, examples: Examples) -> Rewards:
        """The reward functions over the first `eval.num_prompts` held-out rows."""
        objective = self.objective_spec
        functions = reward_functions.functions(objective)
        weights = objective.reward_weights or [1.0] * len(functions)
        prompts = [row for row in examples.held or () if isinstance(row, PromptExample)][: self.spec.eval.num_prompts]

        def rewards_of(answers: list[str]) -> dict[str, float]:
            rest = columns(prompts)
            asked = rest.pop("prompt")
            said = [[{"role": "assistant", "content": answer}] for answer in answers]
            found = {}
            for function in functions:
                values = function(prompts=asked, completions=said, completion_ids=None, **rest)
                found[f"reward_{function.__name__}"] = sum(values) / len(values)
            return {"reward": sum(w * v for w, v in zip(weights, found.values(), strict=True)), **found}

        return rewards_of

    def row_settings(self) -> PreferenceSettings:
        """Answers are as long as the objective lets them become."""
        return PreferenceSettings(self.spec.train.max_length, self.objective_spec.max_new_tokens, False)

    def features(self, rows: Sequence[Learnable]) -> Features:
        """Of questions the turns and the extra fields may be of any shape: Arrow's own columns would fill a tool call
        with the arguments of all others."""
        extra = dict.fromkeys(name for row in rows if isinstance(row, PromptExample) for name in row.extra)
        return Features({**dict.fromkeys(extra, Json()), "prompt": Json(), "answer": Json(), TOOLS: Json()})

    def num_steps(self, num_rows: int) -> int:
        """Each takes as many prompts as the batch has groups; RequestError for too few (TRL would train on none of
        them and say nothing)."""
        train = self.spec.train
        prompts = train.batch_size // self.objective_spec.num_generations
        if num_rows < prompts:
            what = f"{num_rows} prompts, and a step takes {prompts}"
            remedy = "write a smaller train.batch_size, a larger objective.num_generations, or more rows"
            raise RequestError(Problem(what, "data", remedy))
        return train.max_steps or -(-int(train.num_epochs * (num_rows // prompts) * 1000) // 1000)

    def settings(self, shared: SharedSettings) -> GRPOConfig:
        """TRL's. One generation for each optimiser step: its answers are those of the model that learns from them."""
        objective = self.objective_spec
        return GRPOConfig(
            **{name: value for name, value in shared.items() if name != "max_length"},
            num_generations=objective.num_generations,
            max_completion_length=objective.max_new_tokens,
            temperature=objective.temperature,
            beta=objective.beta,
            loss_type=objective.loss,
            epsilon=objective.clip,
            reward_weights=objective.reward_weights,
            disable_dropout=True,
        )

    def trainer(
        self, source: str, model: PreTrainedModel, adapter: PeftConfig | None, common: TrainerParts
    ) -> GrpoTrainer:
        """With the reward functions; TRL loads a reference itself."""
        common["reward_funcs"] = reward_functions.functions(self.objective_spec)
        common["eval_dataset"] = None  # the reward of greedy answers is what is measured (before_after.py)
        made: GrpoTrainer = self.trainer_class(model=model, peft_config=adapter, **common)
        cast_reference(made, DTYPES[str(self.spec.train.precision)])
        return made


def _answer(row: PromptExample) -> list[Turn]:
    first = row.answer[0] if isinstance(row.answer, list) and row.answer else row.answer
    return [] if first is None else [{"role": "assistant", "content": str(first)}]
