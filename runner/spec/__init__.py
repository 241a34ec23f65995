"""The schema of a run after composition.

`RunSpec` is frozen, knows no Hydra and no torch, and refuses unknown keys. Units stand in the
names (`memory_gib`, `usd_per_hour`). The sentence under a field is its documentation:
`docs/reference.md` is generated from it. A default stands here and nowhere else; files in
`conf/` hold only what a choice changes.
"""

from runner.spec.data import DataSpec, SourceSpec
from runner.spec.hw import DeepSpeedSpec, HardwareSpec
from runner.spec.method import Freeze, Full, Lora, Method, Peft, QLora4, QLora8
from runner.spec.model import ModelSpec
from runner.spec.objective import Dpo, Grpo, Kto, Objective, Orpo, Pretrain, Reward, Sft
from runner.spec.part import Auto, Layers, Named, Part
from runner.spec.run import RunInfo, RunSpec, SweepSpec
from runner.spec.train import EvalSpec, PushSpec, TrackSpec, TrainSpec
from runner.spec.where import AutoPlace, LocalPlace, RentedPlace, RunPodPlace, Where

__all__ = [
    "Auto", "AutoPlace", "DataSpec", "DeepSpeedSpec", "Dpo", "EvalSpec", "Freeze", "Full", "Grpo", "HardwareSpec",
    "Kto", "Layers", "LocalPlace", "Lora", "Method", "ModelSpec", "Named", "Objective", "Orpo", "Part", "Peft", "Pretrain",
    "PushSpec", "QLora4", "QLora8", "RentedPlace", "Reward", "RunInfo", "RunPodPlace", "RunSpec", "Sft", "SourceSpec", "SweepSpec", "TrackSpec",
    "TrainSpec", "Where",
]  # fmt: skip
