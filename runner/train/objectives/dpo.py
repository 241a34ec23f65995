"""`objective=dpo` and its variants: chosen against rejected answers."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from runner import spec as schema
from runner.spec import RunSpec
from runner.train.objectives.pairs import REWARDS, Compared, Labelled, Prepared


class DpoTrainer(Prepared, DPOTrainer):  # type: ignore[misc]  # trl has no types
    """Sigmoid, IPO and hinge."""

    METRICS = REWARDS


class CpoTrainer(Labelled, CPOTrainer):  # type: ignore[misc]  # trl has no types
    """CPO and SimPO."""


class Dpo(Compared):
    """DPO, IPO and hinge compare with a reference; CPO and SimPO have none."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.objective, schema.Dpo)
        self.asked_for = spec.objective

    @property
    def trainer_class(self) -> Any:
        """The loss decides."""
        return DpoTrainer if self.asked_for.has_reference else CpoTrainer

    @property
    def adapter_first(self) -> bool:  # type: ignore[override]  # by the loss, where others have a constant
        """CPO's trainer is one of the older ones."""
        return not self.asked_for.has_reference

    def settings(self, shared: dict[str, Any]) -> Any:
        """TRL's, of the trainer that has the loss."""
        objective = self.asked_for
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
