"""The objectives by their names."""

from __future__ import annotations

from runner.data import user_code
from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.train.objectives.dpo import Dpo
from runner.train.objectives.grpo import Grpo
from runner.train.objectives.kto import Kto
from runner.train.objectives.objective import Objective
from runner.train.objectives.orpo import Orpo
from runner.train.objectives.pretraining import Pretrain
from runner.train.objectives.reward_model import Reward
from runner.train.objectives.sft import Sft

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Sft, "pretrain": Pretrain, "dpo": Dpo, "kto": Kto, "orpo": Orpo, "reward": Reward, "grpo": Grpo,
}  # fmt: skip


def objective_of(spec: RunSpec) -> Objective:
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
