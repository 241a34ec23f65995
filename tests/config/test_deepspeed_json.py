"""A DeepSpeed JSON of one's own is read once, for the plan and the run: it decides, it agrees, or it is refused."""

from __future__ import annotations

import json
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest

from runner.cli.options import request_of
from runner.config import deepspeed_json
from runner.config.deepspeed_keys import ELSEWHERE, KEYS
from runner.errors import Problem
from runner.paths import DEEPSPEED_CONFIGS
from runner.resolve.steps import resolved
from runner.spec import RunSpec
from tests.support.front import here, laptop, problems_of, runner, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

WORDS = ("model=mistral7b", "method=lora", "hw=h100x3", "train.batch_size=12", "deepspeed.config=mine.json")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "pin_memory": True}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}


def mine(here: Path, text: str | dict[str, Any]) -> None:
    write(here / "mine.json", text if isinstance(text, str) else json.dumps(text, indent=1))


def run_of(here: Path, content: str | dict[str, Any], *words: str) -> tuple[RunSpec, dict[str, Any]]:
    """The resolved run, and what DeepSpeed is handed."""
    mine(here, content)
    spec = resolved(request_of((*WORDS, *words), ()))[0]
    return spec, json.loads(runner("plan", *WORDS, *words, "--deepspeed").stdout)


def wrong(here: Path, content: str | dict[str, Any], *words: str) -> dict[str, Problem]:
    mine(here, content)
    return problems_of(*WORDS, *words)


def zero(stage: Any = 2, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


# ── what it decides ────────────────────────────────────────────────────────────────────────────


def test_it_decides_stage_offload_precision_and_batch(here: Path) -> None:
    content = zero(3, **OFFLOAD) | {"fp16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2}
    spec, handed = run_of(here, content | {"gradient_accumulation_steps": 2})
    assert (spec.deepspeed.name, spec.train.precision) == ("zero3_offload", "fp16")
    assert (spec.train.micro_batch_size, spec.train.accumulation_steps, spec.train.batch_size) == (2, 2, 12)
    assert handed["train_batch_size"] == 12 and handed["fp16"] == {"enabled": True}
    assert handed["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert run_of(here, zero(1))[0].deepspeed.name == "zero1"
    assert run_of(here, zero(2) | {"bf16": {"enabled": False}, "fp16": {"enabled": False}})[0].train.precision == "fp32"


def test_offload_in_it_is_in_the_plan(here: Path) -> None:
    mine(here, zero(3, **OFFLOAD))
    assert "ZeRO-3 with offload" in " ".join(runner("plan", *WORDS).stdout.split())


def test_what_it_leaves_out_or_at_auto_is_the_runs(here: Path) -> None:
    for content in (zero(), zero() | {"bf16": {"enabled": "auto"}, "train_batch_size": "auto", "optimizer": ADAMW}):
        spec, handed = run_of(here, content, "deepspeed=zero2")
        assert handed["train_batch_size"] == 12 and handed["gradient_clipping"] == 1.0
        assert handed["bf16"]["enabled"] is True and handed["fp16"]["enabled"] is False
        assert "optimizer" not in handed  # the run's own, which the plan counts
        assert spec.train.optimizer == "adamw"


def test_a_batch_that_does_not_divide_is_rounded_as_without_it(here: Path) -> None:
    content = zero() | {"train_batch_size": 16}
    spec, handed = run_of(here, content, "train.batch_size=16")
    assert spec.train.batch_size == handed["train_batch_size"] == 15
    write(here / "spec.json", json.dumps(spec.model_dump(mode="json")))
    assert resolved(request_of(("spec.json",), ()))[0] == spec


def test_the_files_of_hugging_face_axolotl_and_llama_factory_are_taken(here: Path) -> None:
    numbers = {"stage3_max_live_parameters": 1e9, "sub_group_size": 1e9, "reduce_bucket_size": "auto"}
    fp16 = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
    warmup = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "total_num_steps": "auto"}}
    content = zero(3, overlap_comm=True, **numbers) | {"fp16": fp16, "optimizer": ADAMW, "scheduler": warmup}
    spec, handed = run_of(here, content | {"steps_per_print": 2000}, "train.schedule=linear")
    assert spec.deepspeed.name == "zero3" and handed["fp16"] == {**fp16, "enabled": False}
    assert handed["zero_optimization"]["sub_group_size"] == 1_000_000_000
    assert "scheduler" not in handed and "optimizer" not in handed


# ── what contradicts the run: both places are named ────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "words", "what", "remedy"),
    [
        (zero(3), "deepspeed=zero2", "zero_optimization.stage is 3 in mine.json:3, and deepspeed=zero2",
         "write deepspeed=zero3"),
        (zero(2, **{"offload_optimizer": {"device": "cpu"}}), "deepspeed=zero2",
         "zero_optimization is with offload in mine.json:2, and deepspeed=zero2", "write deepspeed=zero2_offload"),
        (zero(), "deepspeed=zero2_offload", "zero_optimization is without offload in mine.json:2, and "
         "deepspeed=zero2_offload", "write deepspeed=zero2"),
        (zero() | {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}, "",
         "optimizer.type is SGD in mine.json:6, and train.optimizer=adamw",
         "write train.optimizer=sgd, or leave the optimizer block out"),
        (zero() | {"optimizer": {"type": "OneBitAdam"}}, "", "optimizer.type is OneBitAdam in mine.json:6, and "
         "train.optimizer=adamw", "leave the optimizer block out"),
        (zero() | {"optimizer": {"type": "Adam", "params": {"lr": 3e-05}}}, "", "optimizer.params.lr is 3e-05 in "
         "mine.json:8, and train.learning_rate=0.0002", 'write train.learning_rate=3e-05, or "auto" in the JSON'),
        (zero() | {"scheduler": {"type": "WarmupLR"}}, "", "scheduler.type is WarmupLR in mine.json:6, and "
         "train.schedule=cosine", "write train.schedule=constant, or leave the scheduler block out"),
        (zero() | {"train_batch_size": 64}, "", "train_batch_size is 64 in mine.json:5, and train.batch_size=12",
         'write train.batch_size=64, or "auto" in the JSON'),
        (zero() | {"gradient_clipping": 0.3}, "", "gradient_clipping is 0.3 in mine.json:5, and "
         "train.max_grad_norm=1.0", 'write train.max_grad_norm=0.3, or "auto" in the JSON'),
        (zero() | {"train_micro_batch_size_per_gpu": 4}, "train.micro_batch_size=2", "train_micro_batch_size_per_gpu "
         "is 4 in mine.json:5, and train.micro_batch_size=2", 'write train.micro_batch_size=4, or "auto" in the JSON'),
        (zero() | {"fp16": {"enabled": True}}, "train.precision=bf16", "fp16.enabled is true in mine.json:6, and "
         "train.precision=bf16", "write train.precision=fp16"),
        (zero() | {"bf16": {"enabled": False}}, "train.precision=bf16", "bf16.enabled is false in mine.json:6, and "
         "train.precision=bf16", 'write "auto" in the JSON'),
        (zero(3, offload_param={"device": "nvme", "nvme_path": "/a"}), "deepspeed.nvme_path=/b",
         "zero_optimization.offload_param.nvme_path is /a in mine.json:6, and deepspeed.nvme_path=/b",
         "leave one of the two out"),
    ],
)  # fmt: skip
def test_what_contradicts_the_run_is_refused(
    here: Path, content: dict[str, Any], words: str, what: str, remedy: str
) -> None:
    found = wrong(here, content, *words.split())
    assert {p.what: p.remedy for p in found.values()} == {what: remedy}


def test_a_file_of_ours_under_another_stage_and_one_without_deepspeed_are_refused(here: Path) -> None:
    words = WORDS[:-1]
    (problem,) = problems_of(*words, "deepspeed=zero2", "deepspeed.config=zero3.json").values()
    assert problem.remedy == "write deepspeed=zero3"
    mine(here, zero())
    (problem,) = problems_of(*WORDS, "deepspeed=none").values()
    assert problem.what == "deepspeed.config=mine.json: deepspeed=none runs without DeepSpeed"
    (problem,) = problems_of(*words, "deepspeed=none", "deepspeed.nvme_path=/x").values()
    assert problem.remedy == "write deepspeed=zero3_offload"


# ── what is no DeepSpeed JSON ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        ("{}", "zero_optimization is missing: expected 1, 2 or 3", 'write "zero_optimization": {"stage": 2}, say'),
        ("null", "deepspeed.config=mine.json holds null, and not a mapping of keys",
         "begin with a copy of deepspeed_configs/zero2.json"),
        ("[]", "deepspeed.config=mine.json holds a list, and not a mapping of keys",
         "begin with a copy of deepspeed_configs/zero2.json"),
        ("{1}", "deepspeed.config=mine.json is not JSON: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)", None),
        ('{"a": 1, "a": 2}', "deepspeed.config=mine.json: the key 'a' occurs twice in one object",
         "leave one of them out"),
        (zero("2"), 'zero_optimization.stage is "2": expected a whole number', 'write "stage": 2'),
        (zero(True), "zero_optimization.stage is true: expected a whole number",
         "leave it out, or see DeepSpeed's documentation"),
        (zero(4), "zero_optimization.stage is 4: expected 1, 2 or 3", 'write "zero_optimization": {"stage": 2}, say'),
        (zero(0), "zero_optimization.stage is 0: expected 1, 2 or 3", "write deepspeed=none instead"),
        ({"zero_optimization": None}, "zero_optimization is null: expected a mapping",
         'write "zero_optimization": {"stage": 2}'),
        (zero(3, offload_param="cpu"), "zero_optimization.offload_param is cpu: expected a mapping",
         'write "offload_param": {"device": "cpu"}'),
        (zero(3, offload_param={"device": "gpu"}), 'zero_optimization.offload_param.device is "gpu": expected one of '
         "none, cpu, nvme", "leave it out, or see DeepSpeed's documentation"),
        (zero(2, offload_param={"device": "cpu"}), "zero_optimization.offload_param needs stage 3, and the stage is 2",
         "leave one out"),
        (zero(overlap_com=True), "unknown key zero_optimization.overlap_com", "did you mean overlap_comm?"),
        (zero() | {"train_bach_size": 3}, "unknown key train_bach_size", "did you mean train_batch_size?"),
        (zero(overlap_comm="auto"), 'zero_optimization.overlap_comm is "auto", which nothing decides',
         "write a value, or leave it out"),
        (zero(overlap_comm="True"), 'zero_optimization.overlap_comm is "True": expected true or false',
         'write "overlap_comm": true'),
        (zero(cpu_offload=True), "zero_optimization.cpu_offload has no place in a run",
         "write offload_optimizer: {device: cpu}"),
        (zero() | {"activation_checkpointing": {}}, "activation_checkpointing has no place in a run",
         "layers do not call DeepSpeed's; train.gradient_checkpointing decides it"),
        (zero() | {"amp": {"enabled": True}}, "amp has no place in a run",
         "DeepSpeed has given Apex up; train.precision decides it"),
        (zero() | {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both switched on",
         'write "auto" in both'),
        (zero() | {"optimizer": {"params": {"betas": [0.8, 0.9]}}}, "optimizer.type is missing",
         "leave the optimizer block out"),
        (zero() | {"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, "optimizer.params.betas is "
         "[0.8, 0.9]: the optimizer is the run's own, which does not have it", 'write "auto", or leave it out'),
        (zero() | {"scheduler": {"type": "OneCycle"}}, "scheduler.type=OneCycle is none of WarmupLR, WarmupDecayLR, "
         "WarmupCosineLR", "leave the block out: train.schedule decides it"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_told_with_its_line(here: Path, content: Any, what: str, remedy: str | None) -> None:
    found = wrong(here, content)
    assert found[what].remedy == remedy
    assert (found[what].source or "").startswith("mine.json")
    result = runner("plan", *WORDS)
    assert result.exit_code == 2 and what in result.stderr


def test_every_mistake_is_told_at_once(here: Path) -> None:
    assert len(wrong(here, zero("2", stge=3) | {"bf16": {"enbled": 1}, "amp": {}})) == 4
    assert [p.source for p in wrong(here, zero(stge=3)).values()] == ["mine.json:4"]


def test_a_byte_order_mark_a_folder_and_latin_1(here: Path) -> None:
    (here / "mine.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(zero()).encode())
    assert resolved(request_of(WORDS, ()))[0].deepspeed.name == "zero2"
    (here / "mine.json").write_bytes(b'{"zero_optimization": "\xe9"}')
    assert list(problems_of(*WORDS)) == ["deepspeed.config=mine.json: it is not UTF-8"]
    assert list(problems_of(*WORDS, "deepspeed.config=/")) == ["deepspeed.config=/: Is a directory"]


# ── what DeepSpeed itself knows ────────────────────────────────────────────────────────────────


def test_our_own_files_are_right() -> None:
    for file in DEEPSPEED_CONFIGS.glob("*.json"):
        assert deepspeed_json.read_deepspeed_json(file.name).stage == file.stem


@pytest.mark.skipif(util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_keys_are_those_of_deepspeed() -> None:
    models = {
        "zero_optimization": ("runtime.zero.config", "DeepSpeedZeroConfig"),
        "zero_optimization.offload_param": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
        "zero_optimization.offload_optimizer": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
        "bf16": ("runtime.precision_config", "DeepSpeedBF16Config"),
        "fp16": ("runtime.precision_config", "DeepSpeedFP16Config"),
    }
    for key, (module, name) in models.items():
        fields = getattr(import_module(f"deepspeed.{module}"), name).model_fields
        theirs = {str(field.alias or own) for own, field in fields.items()}
        ours: Any = KEYS
        for step in key.split("."):
            ours = ours[step]
        elsewhere = {k.rpartition(".")[2] for k in ELSEWHERE if k.startswith(f"{key}.")}
        assert set(ours) | (elsewhere & theirs) == theirs, key
