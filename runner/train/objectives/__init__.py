"""The objectives by name: what each trains on, and with which trainer and metrics."""

from __future__ import annotations

from typing import Any

from runner.data import user_code
from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.train.objectives.grpo import Grpo
from runner.train.objectives.kto import Kto
from runner.train.objectives.objective import Objective
from runner.train.objectives.preference import Dpo, Orpo, Reward
from runner.train.objectives.pretraining import Pretrain
from runner.train.objectives.sft import Sft

OBJECTIVES: dict[str, type[Objective[Any]]] = {
    "sft": Sft, "pretrain": Pretrain, "dpo": Dpo, "kto": Kto, "orpo": Orpo, "reward": Reward, "grpo": Grpo,
}  # fmt: skip


def objective_of(spec: RunSpec) -> Objective[Any]:
    """The run's objective; RequestError where `objective.code` is no subclass of the one whose rows it takes."""
    base, code = OBJECTIVES[spec.objective.name], spec.objective.code
    if code is None:
        return base(spec)
    own = user_code.load(code, "objective.code")
    if not (isinstance(own, type) and issubclass(own, base)):
        what = f"{code} is no subclass of {base.__module__}.{base.__name__}"
        remedy = f"derive it from that, whose rows objective.name={spec.objective.name} are"
        raise RequestError(Problem(what, "objective.code", remedy))
    return own(spec)
