"""Models that no arithmetic knows, simulated: against the arithmetic of known ones, all layers, and real steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from runner.errors import RequestError
from runner.hub.model_config import facts_from_config
from runner.plan import simulation
from runner.plan.autograd.step_peak import Step
from runner.plan.choose_stage import StageSearch
from runner.plan.memory import Job, setting_of
from runner.plan.model_shape import Shape, shape_of
from runner.plan.simulation import simulated_flops, step_of
from runner.plan.step_time import flops_per_token
from runner.plan.trainable import Training
from runner.resolve.simulator import Process, simulated_shape
from runner.spec import ModelSpec, RunSpec
from runner.train import simulated_model, simulated_step
from runner.train.fake_tensors import LiveBytes, gpu_like
from tests.conftest import spec_of

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 192, "first_k_dense_replace": 1, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
UNKNOWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**LATENT, "q_lora_rank": 64},
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "llama4_text": {
        "num_hidden_layers": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 32,
        "intermediate_size_mlp": 704,
    },
    "qwen3_5_text": {
        "num_hidden_layers": 8, "head_dim": 32, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8},
    "starcoder2": {},
    "stablelm": {},
    "lfm2": {"num_hidden_layers": 6},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 32, "head_dim": 32, "num_hidden_layers": 8},
    "gemma4_text": {"num_hidden_layers": 6, "head_dim": 32, "global_head_dim": 32},
}  # fmt: skip


TYPES = [
    pytest.param(name, marks=() if name in ("deepseek_v3", "starcoder2") else pytest.mark.slow) for name in UNKNOWN
]


class Here(Process):
    """The simulation in this process."""

    def _asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(simulated_step.ANSWERS[request["do"]](request)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    simulation._simulated.cache_clear()
    yield
    simulated_model.built.cache_clear()


def config_of(model_type: str, **more: Any) -> str:
    """A config.json of a small model."""
    values = {**SIZES, **UNKNOWN.get(model_type, {}), **more}
    return json.dumps(AutoConfig.for_model(model_type, **values).to_dict(), sort_keys=True)


def shape_from(config: str) -> Shape:
    return simulated_shape("tiny", config, "config.json", Here())


def run_of(method: str, *more: str) -> RunSpec:
    return spec_of("model=mistral7b", f"method={method}", "hw=h200", "train.precision=bf16", *more)


def setting(
    shape: Shape, spec: RunSpec, checkpointing: int = 0, b: int = 2, s: int = 192, deepspeed: bool = False
) -> tuple[Training, Any]:
    training = StageSearch({}).training(shape, spec.method, "bf16", deepspeed=deepspeed)
    job = Job(
        seq=s, precision="bf16", checkpointing=checkpointing, attention="flash", optimizer="adamw", on_gpu=True,
    )  # fmt: skip
    return training, setting_of(training, job, b)


def planned(shape: Shape, spec: RunSpec, checkpointing: int = 0, held: bool = False, **more: Any) -> Step:
    training, chosen = setting(shape, spec, checkpointing, **more)
    return step_of(training.shape, chosen, training.trains, held)


def assert_same(step: Step, other: Step, within: float) -> None:
    for phase in ("forward", "backward"):
        one, two = getattr(step, phase).total, getattr(other, phase).total
        assert one == pytest.approx(two, rel=within), f"{phase}: {one / two - 1:+.3%}"


KNOWN: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"head_dim": 32},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
@pytest.mark.parametrize("model_type", KNOWN)
def test_a_known_model_is_simulated_as_it_is_calculated(model_type: str, method: str) -> None:
    config = config_of(model_type, **KNOWN[model_type], num_hidden_layers=12)
    simulated = shape_from(config)
    calculated = shape_of(ModelSpec.model_validate({"id": "x/y", **facts_from_config(json.loads(config))}))
    assert simulated.num_parameters == calculated.num_parameters
    spec = run_of(method)
    for checkpointing in (0, 1, 4):
        ours, theirs = setting(calculated, spec, checkpointing, s=1024), setting(simulated, spec, checkpointing, s=1024)
        assert theirs[0].trainable == ours[0].trainable and theirs[0].frozen_bytes == ours[0].frozen_bytes
        assert theirs[0].trained_bytes == ours[0].trained_bytes
        one = step_of(ours[0].shape, ours[1], ours[0].trains)
        two = step_of(theirs[0].shape, theirs[1], theirs[0].trains)
        assert_same(two, one, 0.0015)
        if model_type == "qwen3_moe" and method == "lora":  # the formula counts the adapters of experts not routed to
            continue
        flops = flops_per_token(
            calculated, 1024, method=method, trained_layers=ours[0].trained_layers, checkpointing=checkpointing,
            adapter_parameters=ours[0].adapter_weights, backward_layers=ours[0].backward_layers,
        )  # fmt: skip
        seen = simulated_flops(theirs[0].shape, theirs[1], theirs[0].trains)[1] / 2048
        # recomputation ends before the last product of a layer, which nothing needs again
        assert seen == pytest.approx(flops, rel=0.06 if checkpointing else 0.02)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_few_layers_stand_for_all(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = {"num_hidden_layers": 24}
    shape = shape_from(config_of(model_type, **deep))
    for method, checkpointing in (("full", 0), ("lora", 0), ("lora", 1), ("full", 1)):
        few = planned(shape, run_of(method), checkpointing)
        with monkeypatch.context() as patch:
            patch.setattr(simulation, "SHOWN", 100)
            simulation._simulated.cache_clear()
            every = planned(shape, run_of(method), checkpointing)
        simulation._simulated.cache_clear()
        assert_same(few, every, 1e-9)


def real_step(config: str, spec: RunSpec, checkpointing: int, b: int = 2, s: int = 192) -> dict[str, int]:
    """Peaks of a step with weights and numbers."""
    asked = {
        "method": spec.method.model_dump(mode="json"), "precision": "bf16", "deepspeed": False, "name": "tiny",
        "attention": "flash", "head": "fused", "b": b, "s": s,
    }  # fmt: skip
    part = simulated_model.method_part(asked)
    model = simulated_model.built.__wrapped__(config, part, bool(checkpointing), "cpu")
    counter, ids = LiveBytes(), torch.zeros(b, s, dtype=torch.int64)
    for there in (*model.parameters(), *model.buffers(), ids):
        counter.count(there)
    start = counter.live
    with simulated_step.attention_of(model, asked), gpu_like(), counter:
        counter.enter("forward")
        with torch.autocast("cpu", torch.bfloat16):
            loss = simulated_step.loss_of(model, ids, ids, asked)
        counter.enter("backward")
        loss.backward()
    return {phase: peak - start for phase, peak in counter.peaks.items()}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_unknown_model_peaks_where_its_real_step_does(model_type: str, method: str) -> None:
    config, spec = config_of(model_type), run_of(method)
    shape = shape_from(config)
    for checkpointing in (0, 1):
        plan, real = planned(shape, spec, checkpointing), real_step(config, spec, checkpointing)
        for phase in ("forward", "backward"):
            total = getattr(plan, phase).total
            assert total == pytest.approx(real[phase], rel=0.01), f"{phase}: {total / real[phase] - 1:+.2%}"


def test_a_second_micro_batch_and_sharded_gradients_are_simulated() -> None:
    shape = shape_from(config_of("starcoder2"))
    spec = run_of("full")
    first, second = planned(shape, spec, 1, s=32), planned(shape, spec, 1, held=True, s=32)
    assert first.backward.kinds["gradients"] > 0 and second.backward.kinds["gradients"] == 0
    assert planned(shape, spec, 1, deepspeed=True, s=32).backward.total < first.backward.total


def test_more_sequences_take_more_in_proportion() -> None:
    shape = shape_from(config_of("starcoder2"))
    one, two, three = (planned(shape, run_of("lora"), b=b).forward.total for b in (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=0.001)


def test_a_method_that_cannot_be_simulated_says_what_is_known() -> None:
    shape = shape_from(config_of("starcoder2"))
    with pytest.raises(
        RequestError, match=r"qlora4 of starcoder2 cannot be simulated.*its weights take 0\.\d GiB at most"
    ) as caught:
        setting(shape, run_of("qlora4"))
    assert caught.value.problems[0].remedy == "plan method=lora: its weights take 16 bits"


def test_a_model_whose_code_reads_values_is_refused() -> None:
    shape = simulated_shape("tiny", config_of("jetmoe", num_local_experts=4, kv_channels=32), "config.json", Process())
    with pytest.raises(RequestError, match="jetmoe cannot be simulated: DataDependentOutputException") as caught:
        planned(shape, run_of("lora"))
    assert "a known model of about its sizes" in str(caught.value.problems[0].remedy)


def test_scores_are_counted_where_the_models_code_takes_no_kernel() -> None:
    config = config_of("bloom", n_layer=3, n_head=8)
    shape = shape_from(config)
    short, long = (planned(shape, run_of("lora"), s=s).forward.total for s in (128, 1024))
    assert long > 12 * short
    assert shape.simulation is not None and shape.simulation.facts().attention == "eager"
