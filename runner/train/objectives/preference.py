"""`objective=dpo` (IPO, hinge, CPO and SimPO, too), `orpo` and `reward`: chosen against rejected answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Features, List, Value
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from runner import spec as schema
from runner.data.tokenize_rows import PreferenceSettings
from runner.spec import Full, RunSpec
from runner.train import model_loading
from runner.train.model_loading import DTYPES
from runner.train.objectives.objective import Objective, Own
from runner.train.tokens import preference_dataset
from runner.train.tokens.token_cache import OnProgress, Tokenised
from runner.train.trainers.guarded_trainer import LossGuardMixin
from runner.train.trainers.preference_trainer import REWARD_METRICS, LabelledPairsMixin, TokenisedPairsMixin

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runner.data.examples import Learnable
    from runner.train.objectives.objective import TrainerParts
    from runner.train.trainers.trainer_settings import SharedSettings


class PreferenceObjective(Objective[Own]):
    """An objective over rows that are tokenised in columns, with a reference model where its loss asks for one."""

    trainer_class: Any
    columns: tuple[str, ...] = ("prompt_ids", "chosen_ids", "chosen_given", "rejected_ids", "rejected_given")
    """Columns of token ids."""
    adapter_first = False
    """TRL's older trainers (ORPO and CPO in TRL 1.16) would make every other weight of a packed base fp32
    (`prepare_model_for_kbit_training`), so they get a model with its adapter."""

    def tokenise(
        self, rows: Sequence[Learnable], tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress | None = None,
        *, held: bool = False,
    ) -> Tokenised:  # fmt: skip
        """As `Objective.tokenise`, in `columns`."""
        settings, features = self.row_settings(), self.features(rows)
        return preference_dataset.tokenise(rows, tokenizer, self.spec, settings, features, on_progress)

    def row_settings(self) -> PreferenceSettings:
        """Limit of tokens in a row, and which end is cut."""
        return PreferenceSettings(self.spec.train.max_length, 1, False)

    def features(self, rows: Sequence[Learnable]) -> Features:
        """Arrow's types of the columns."""
        return Features(dict.fromkeys(self.columns, List(Value("int32"))))

    def trainer(
        self, source: str, model: PreTrainedModel, adapter: PeftConfig | None, common: TrainerParts
    ) -> LossGuardMixin:
        """With a copy of the model as its reference, where that is needed."""
        if self.adapter_first and adapter is not None:
            model, adapter = _with_adapter(self.spec, model, adapter), None
        if self.spec.objective.passes(self.spec.method.adapts).separate_reference:
            common["ref_model"] = load_reference(self.spec, source)
        made: LossGuardMixin = self.trainer_class(model=model, peft_config=adapter, **common)
        return made


def load_reference(spec: RunSpec, source: str) -> PreTrainedModel:
    """Load the model as it is before training, frozen, in the compute dtype. An adapter needs none: switched off, it
    leaves its base."""
    frozen = spec.model_copy(update={"method": Full(master_weights=False)})
    return model_loading.load_model(frozen, source).requires_grad_(False)


def _with_adapter(spec: RunSpec, model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put the adapter on as TRL's newer trainers do: 16 bits wide over a packed base, under ZeRO-3 like the base."""
    sharded = spec.deepspeed.name.startswith("zero3")
    packed = spec.method.packed
    whole = get_peft_model(model, config, autocast_adapter_dtype=not sharded or packed)
    if packed:
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(DTYPES["bf16"])
    return whole


class DpoTrainer(TokenisedPairsMixin, DPOTrainer):  # type: ignore[misc]  # trl has no types
    """Trainer of the losses with a reference: sigmoid, IPO and hinge."""

    METRICS = REWARD_METRICS


class CpoTrainer(LabelledPairsMixin, CPOTrainer):  # type: ignore[misc]  # trl has no types
    """Trainer of the losses without a reference: CPO and SimPO."""


class Dpo(PreferenceObjective[schema.Dpo]):
    """DPO, IPO and hinge compare with a reference; CPO and SimPO have none."""

    @property
    def trainer_class(self) -> type[TokenisedPairsMixin] | type[LabelledPairsMixin]:
        """By the loss."""
        return DpoTrainer if self.objective_spec.has_reference else CpoTrainer

    @property
    def adapter_first(self) -> bool:  # type: ignore[override]  # by the loss, where others have a constant
        """True for CPO's trainer, one of the older ones."""
        return not self.objective_spec.has_reference

    def settings(self, shared: SharedSettings) -> DPOConfig | CPOConfig:
        """TRL's settings, of the trainer that has the loss."""
        objective = self.objective_spec
        if objective.has_reference:
            robust = objective.loss == "sigmoid" and objective.label_smoothing > 0
            return DPOConfig(
                **shared,
                beta=objective.strength,
                loss_type=["robust" if robust else objective.loss],
                label_smoothing=objective.label_smoothing,
                precompute_ref_log_probs=objective.precompute_reference,
            )
        weight = objective.chosen_weight
        return CPOConfig(
            **shared,
            beta=objective.strength,
            loss_type="simpo" if objective.loss == "simpo" else "sigmoid",
            label_smoothing=objective.label_smoothing,
            simpo_gamma=objective.simpo_margin,
            cpo_alpha=weight if isinstance(weight, float) else 0.0 if objective.loss == "simpo" else 1.0,
            remove_unused_columns=False,
        )


class OrpoTrainer(LabelledPairsMixin, ORPOTrainer):  # type: ignore[misc]  # trl has no types
    """Trainer of next-token loss and odds ratio."""

    METRICS = LabelledPairsMixin.METRICS | {"log_odds_ratio": "log_odds_ratio"}
    LEARNED = ("chosen_attention_mask", 0)  # the prompt, too


class Orpo(PreferenceObjective[schema.Orpo]):
    """Odds ratio preference optimisation (arXiv 2403.07691): no reference."""

    trainer_class = OrpoTrainer
    adapter_first = True

    def settings(self, shared: SharedSettings) -> ORPOConfig:
        """TRL's settings."""
        return ORPOConfig(**shared, beta=self.objective_spec.beta, remove_unused_columns=False)


class RewardModelTrainer(TokenisedPairsMixin, RewardTrainer):  # type: ignore[misc]  # trl has no types
    """Trainer of a reward model."""

    METRICS = {"accuracy": "reward_accuracy", "margin": "reward_margin", "mean_reward": "reward"}  # noqa: RUF012  # as in LossGuardMixin, read only


class Reward(PreferenceObjective[schema.Reward]):
    """A reward model: one number at the end of an answer, so no answer may be cut."""

    trainer_class = RewardModelTrainer
    columns = ("chosen_ids", "rejected_ids")

    def row_settings(self) -> PreferenceSettings:
        """No row is cut."""
        return PreferenceSettings(self.spec.train.max_length, 1, True)

    def settings(self, shared: SharedSettings) -> RewardConfig:
        """TRL's settings."""
        return RewardConfig(**shared, center_rewards_coefficient=self.objective_spec.center)
