"""A step's time: operations checked by hand, and the whole against measurements that others published."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from runner.config.conf_files import load_choice, options
from runner.plan.choose_stage import attention_span, job_of
from runner.plan.hardware_speed import (
    CPU_ADAM_S_PER_PARAMETER,
    CPU_PASS_S,
    CPU_PASS_WITHOUT_ADAPTER_S,
    HIDDEN_SHARE,
    PASS_S,
    PASS_WITHOUT_ADAPTER_S,
)
from runner.plan.model_shape import Shape, shape_of
from runner.plan.step_time import (
    Machine,
    Stage,
    StepTime,
    Work,
    evaluation_time,
    flops_per_token,
    machine_of,
    step_time,
    work_of,
)
from runner.spec import HardwareSpec, ModelSpec
from tests.conftest import spec_of

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("full", "freeze", "lora", "qlora4", "qlora8")
STAGES: tuple[Stage, ...] = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> None:
    """What one test has computed is no answer for another."""
    flops_per_token.cache_clear()


def shape(name: str) -> Shape:
    return shape_of(ModelSpec(**load_choice("model", name)))


def qwen(layers: int, hidden: int, inner: int, heads: int) -> Shape:
    """Qwen of 2023: a Llama with 152 thousand tokens."""
    sizes: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_heads": heads,
        "num_kv_heads": heads,
        "vocab_size": 151936,
        "context_length": 8192,
        "tie_embeddings": False,
    }
    return shape_of(ModelSpec(id="Qwen", architecture="llama", **sizes))


def machine(name: str, precision: str = "bf16", **changes: Any) -> Machine:
    found = machine_of(HardwareSpec(**{**load_choice("hw", name), **changes}), precision)
    assert found is not None
    return found


def work(model: Shape, seq: int = 1024, method: str = "full", checkpointing: bool = True, **more: Any) -> Work:
    trained = model.num_parameters if method == "full" else 40_000_000
    adapter = 40_000_000 if "lora" in method else 0
    settings = {"trained_layers": model.num_layers, "trained_parameters": trained, "adapter_parameters": adapter}
    return work_of(model, seq, method=method, checkpointing=checkpointing, **{**settings, **more})


def step(of: Work, on: Machine, micro: int = 1, accumulation: int = 1, **more: Any) -> StepTime:
    return step_time(of, on, micro_batch=micro, accumulation=accumulation, **more)


# --- operations ------------------------------------------------------------------------------------------------

MISTRAL = shape("mistral7b")
LAYERS = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # q, o; k, v; gate, up, down
HEAD = 32000 * 4096


def flops(seq: int = 0, of: Shape = MISTRAL, **how: Any) -> float:
    settings = {"method": "full", "trained_layers": of.num_layers, "checkpointing": False}
    return flops_per_token(of, seq, **{**settings, **how})


def test_full_training_is_six_operations_a_weight_and_eight_when_layers_run_twice() -> None:
    assert flops() == 6 * (LAYERS + HEAD)
    assert flops(checkpointing=True) == 8 * LAYERS + 6 * HEAD
    assert flops() == pytest.approx(6 * MISTRAL.num_parameters, rel=0.02)  # embeddings are looked up, not multiplied


def test_lora_spares_the_gradients_of_the_frozen_weights() -> None:
    assert flops(method="lora") == 4 * (LAYERS + HEAD)
    assert flops(method="lora", checkpointing=True) == 6 * LAYERS + 4 * HEAD
    assert flops(method="lora", adapter_parameters=1000) - flops(method="lora") == 6000
    assert flops(method="qlora4") == flops(method="qlora8") == flops(method="lora")


def test_a_part_of_the_layers_runs_again_the_first_and_every_nth() -> None:
    once = flops(checkpointing=True) - flops()
    assert flops(checkpointing=2) - flops() == pytest.approx(once / 2)
    assert flops(checkpointing=3) - flops() == pytest.approx(once * 11 / 32)
    assert flops(checkpointing=40) - flops() == pytest.approx(once / 32)
    # Of the two last layers the 31st is one of every second (1, 3, … 31), and none is one of every fourth's (… 29).
    frozen = [flops(method="freeze", trained_layers=2, checkpointing=every) for every in (0, 4, 2, 1)]
    assert frozen[0] == frozen[1] and frozen[3] - frozen[2] == pytest.approx(frozen[2] - frozen[0])
    lora = [flops(method="lora", adapter_parameters=10**6, checkpointing=every) for every in (0, 2, 1)]
    assert lora[2] - lora[1] == pytest.approx(lora[1] - lora[0])
    some = work(MISTRAL, method="qlora4", checkpointing=4)
    assert (some.passes, some.unpacked_weights) == (3.25, 2.25 * LAYERS)


def test_freezing_spares_everything_below_the_first_layer_that_trains() -> None:
    one = LAYERS / 32
    assert flops(method="freeze", trained_layers=2) == 2 * LAYERS + 4 * HEAD + 2 * 4 * one
    # The first two layers: the loss flows through all 32 to reach them.
    assert flops(method="freeze", trained_layers=2, backward_layers=32) == 4 * (LAYERS + HEAD) + 2 * 2 * one
    assert flops(method="freeze", trained_layers=2, checkpointing=True) - flops(
        method="freeze", trained_layers=2
    ) == pytest.approx(2 * 2 * one)


def test_causal_attention_costs_two_operations_a_position_and_feature() -> None:
    forward = 2 * 1000 * 4096 * 32
    assert flops(1000) - flops() == 3 * forward
    assert flops(1000, checkpointing=True) - flops(checkpointing=True) == 4 * forward


def test_a_mixture_computes_the_experts_a_token_goes_to() -> None:
    mixtral = shape("mixtral_8x7b")
    experts = 32 * 3 * 4096 * 14336
    dense = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 4096 * 8)
    assert flops(of=mixtral) == 6 * (dense + 2 * experts + HEAD)


def test_full_training_reaches_every_layer_whatever_is_said_of_the_top_ones() -> None:
    assert flops(trained_layers=2) == flops(trained_layers=2, backward_layers=1) == flops()
    few = work(MISTRAL, trained_layers=2, backward_layers=1)
    assert few.passes == work(MISTRAL).passes == 4  # forward, recomputation, backward as two
    assert few.unpacked_weights == 0


def test_a_reference_model_adds_its_forward_passes() -> None:
    one = 2 * (LAYERS + HEAD)
    assert flops(quiet=2) - flops() == 2 * one
    assert work(MISTRAL, quiet=1).passes == work(MISTRAL).passes + 1
    four = work(MISTRAL, 1024, "qlora4", quiet=1)
    assert four.flops_per_token - work(MISTRAL, 1024, "qlora4").flops_per_token == one + 2 * 1024 * 4096 * 32
    assert four.unpacked_weights == LAYERS * (1 + 1 + 2)


def test_a_frozen_model_is_passed_forward_and_only_reached_layers_again() -> None:
    half = {"trained_layers": 2, "backward_layers": 16}
    assert work(MISTRAL, method="freeze", checkpointing=False, **half).passes == 1 + 0.5 * 2
    assert work(MISTRAL, method="freeze", checkpointing=True, **half).passes == 1 + 0.5 * 3
    assert work(MISTRAL, method="freeze", checkpointing=False, **half).flops_per_token == flops(
        1024, method="freeze", **half
    )


def test_quantised_weights_are_unpacked_in_every_pass_that_multiplies_in_16_bits() -> None:
    assert work(MISTRAL, method="qlora4", checkpointing=True).unpacked_weights == 3 * LAYERS
    assert work(MISTRAL, method="qlora4", checkpointing=False).unpacked_weights == 2 * LAYERS
    assert work(MISTRAL, method="qlora8").unpacked_weights == 0  # int8 layers multiply in int8
    mixtral = shape("mixtral_8x7b")
    experts = 32 * 8 * 3 * 4096 * 14336
    assert work(mixtral, method="qlora8", checkpointing=False).unpacked_weights == 2 * experts
    four = work(mixtral, method="qlora4", checkpointing=False).unpacked_weights
    assert four == 2 * (experts + 32 * (2 * 4096**2 + 2 * 4096 * 1024))  # the router stays as it is
    assert work(MISTRAL, method="lora").unpacked_weights == work(MISTRAL).unpacked_weights == 0


def test_weights_are_two_bytes_unless_they_are_stored_otherwise() -> None:
    assert work(MISTRAL).weight_bytes == 2 * MISTRAL.num_parameters
    assert work(MISTRAL, weight_bytes=7.0).weight_bytes == 7.0
    settings: Any = {"method": "lora", "trained_layers": 32, "checkpointing": False, "trained_parameters": 5}
    assert work_of(MISTRAL, 8, **settings).flops_per_token == flops(8, method="lora")  # without an adapter's own
    with_adapter = work_of(MISTRAL, 8, **settings, adapter_parameters=1000)
    assert with_adapter.flops_per_token == flops(8, method="lora") + 6000


# --- against published measurements ----------------------------------------------------------------------------

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
# Seconds for 8 sequences, one after the other, on an A100 (github.com/QwenLM/Qwen, README).
QWEN = [
    ((24, 2048, 5504, 16), "lora", (1.0, 1.0, 1.1, 1.7, 3.3, 6.8)),
    ((24, 2048, 5504, 16), "qlora4", (1.4, 1.4, 1.4, 2.0, 3.4, 6.5)),
    ((32, 4096, 11008, 32), "lora", (1.2, 1.5, 2.8, 5.2, 10.1, 21.3)),
    ((32, 4096, 11008, 32), "qlora4", (3.0, 3.0, 3.5, 7.0, 11.6, 22.3)),
    ((40, 5120, 13696, 40), "lora", (1.6, 2.4, 4.4, 8.4, 17.0, 36.0)),
    ((40, 5120, 13696, 40), "qlora4", (5.3, 6.3, 8.2, 11.8, 20.1, 38.3)),
]


@pytest.mark.parametrize(("sizes", "method", "seconds"), QWEN)
def test_lora_on_an_a100_is_within_a_quarter_of_what_qwen_measured(
    sizes: tuple[int, int, int, int], method: str, seconds: tuple[float, ...]
) -> None:
    for seq, measured in zip(LENGTHS, seconds, strict=True):
        found = step(work(qwen(*sizes), seq, method), machine("a100"), accumulation=8)
        assert found.total_s == pytest.approx(measured, rel=0.26), seq


# Sequences of 4096 tokens a second, LLaMA-7B on 8 A800s, 64 a step (gist chenyaofo/d4cd6a20, 2024).
@pytest.mark.parametrize(
    ("stage", "checkpointing", "micro", "measured"),
    [
        ("zero2", False, 1, 5.33),
        ("zero2", True, 1, 4.19),
        ("zero2_offload", True, 1, 1.81),
        ("zero2", True, 4, 4.69),
        ("zero3", False, 2, 4.95),
        ("zero3", True, 2, 4.45),
        ("zero3", True, 8, 4.73),
        ("zero3_offload", True, 4, 2.06),
    ],
)
def test_zero_and_offload_are_within_a_sixth_of_what_deepspeed_did(
    stage: Stage, checkpointing: bool, micro: int, measured: float
) -> None:
    of = work(shape("llama2_7b"), 4096, "full", checkpointing)
    found = step(of, machine("a100x8"), micro, 8 // micro, stage=stage)
    assert 64 / found.total_s == pytest.approx(measured, rel=1 / 6)


def test_the_default_job_takes_what_was_measured_within_a_third() -> None:
    """On an EPYC of 2022 (2026-11-21), and on one of 2024: the median step of `python -m benchmarks throughput_cpu`."""
    runs = json.loads((ROOT / "benchmarks/results/throughput_cpu.json").read_text("utf-8"))["measured"]
    measured = median(second for run in runs["comparisons"]["worker"] for second in run["seconds"])
    of = work(shape("smollm2_135m"), 256, "lora", False, trained_parameters=4_884_480, adapter_parameters=4_884_480)
    cpu = machine_of(HardwareSpec(name="cpu", accelerator="cpu", num_cpus=2), "bf16")
    assert cpu is not None
    found = step(of, cpu)
    assert found.total_s == pytest.approx(0.781, rel=1 / 3)
    assert found.total_s == pytest.approx(measured, rel=1 / 3)
    assert found.notes == ("CPU speed: per core as measured in docs/benchmarks.md, a third more or less",)


# --- what must hold everywhere ---------------------------------------------------------------------------------


def test_every_gpu_of_the_catalogue_has_a_speed_and_says_where_it_is_from() -> None:
    for name in options("hw"):
        values = load_choice("hw", name)
        if values["accelerator"] == "cuda":
            found = step(work(MISTRAL, 1024, "lora"), machine(name, "bf16" if values["bf16"] else "fp16"), 2)
            assert 0.1 < found.efficiency < 0.7, name
            assert found.total_s == found.compute_s + found.communication_s + found.update_s > 0
            assert any("assumption" in note or " 20" in note for note in found.notes), name


def test_a_gpu_whose_speed_nobody_knows_is_not_guessed() -> None:
    assert machine_of(HardwareSpec(name="x", accelerator="cuda", num_gpus=1, memory_gib=24), "bf16") is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_more_work_takes_longer_and_better_hardware_less(method: str, stage: Stage) -> None:
    on, of = machine("a100x8"), work(MISTRAL, 1024, method)
    base = step(of, on, 1, 2, stage=stage).total_s
    assert step(of, on, 1, 3, stage=stage).total_s > base
    assert step(of, on, 2, 2, stage=stage).total_s > base
    assert step(work(MISTRAL, 2048, method), on, 1, 2, stage=stage).total_s > base
    assert step(work(MISTRAL, 1024, method, checkpointing=False), on, 1, 2, stage=stage).total_s < base
    assert step(of, machine("h100x8"), 4, 2, stage=stage).total_s < step(of, on, 4, 2, stage=stage).total_s


def test_methods_rank_as_their_arithmetic_does() -> None:
    seconds = {m: step(work(MISTRAL, 4096, m, False), machine("l40s"), 2, 4).total_s for m in METHODS}
    assert seconds["lora"] < seconds["qlora4"] < seconds["qlora8"]
    assert seconds["lora"] < seconds["full"]
    frozen = work(MISTRAL, 4096, "freeze", False, trained_layers=2, trained_parameters=436_224_000)
    assert step(frozen, machine("l40s"), 2, 4).total_s < seconds["lora"]


# --- sending ---------------------------------------------------------------------------------------------------


def exposed(stage: Stage, accumulation: int = 1, name: str = "a100x8", method: str = "full") -> float:
    """Seconds of sending beside one token of computing, which hides next to nothing."""
    return step(work(MISTRAL, 1, method), machine(name, tflops_bf16=1e6), 1, accumulation, stage=stage).communication_s


LINK, HOST, EIGHT = 100.0, 10.0, 8
PLAIN = Machine(True, 1e3, 1e3, 8.0, 312.0, LINK, HOST, EIGHT, 2)
"""Eight processes on two nodes; bytes a second small enough to reckon with."""


def moved(stage: Stage, accumulation: int = 1, flops_: float = 0.0, on: Machine = PLAIN) -> StepTime:
    """A step that computes next to nothing: 40 trained parameters, gradients of 4 bytes, weights of 1,000 bytes."""
    of = Work("full", flops_, 1, 0.0, 0, 0.0, 40, 1000.0, 4)
    return step(of, on, 1, accumulation, stage=stage)


@pytest.mark.parametrize(
    ("stage", "sent", "to_host", "after"),
    [
        # of N = 8 processes each sends 7/8; gradients 160 bytes, updated weights 2 × 40
        ("none", 2 * 160 * 7 / 8, 0, 0),
        ("zero1", 160 * 7 / 8, 0, 80 * 7 / 8 / LINK),
        ("zero2", 3 * 160 * 7 / 8, 0, 80 * 7 / 8 / LINK),
        ("zero2_offload", 3 * 160 * 7 / 8, 3 * 160 / 8, 80 * 7 / 8 / LINK + 80 / 8 / HOST),
        ("zero3", 3 * (2000 + 160) * 7 / 8, 0, 0),
        ("zero3_offload", 3 * (2000 + 160) * 7 / 8, 3 * (160 + 2000) / 8, 80 / 8 / HOST),
    ],
)
def test_what_each_stage_sends_in_three_micro_batches(stage: Stage, sent: float, to_host: float, after: float) -> None:
    found = moved(stage, 3)
    assert found.communication_s == pytest.approx(sent / LINK + to_host / HOST + after)
    assert found.total_s == found.compute_s + found.communication_s + found.update_s
    busy = moved(stage, 3, flops_=1000.0)  # computing hides a share of it, but never what comes after the update
    hidden = min(HIDDEN_SHARE * busy.compute_s, sent / LINK + to_host / HOST)
    assert busy.communication_s == pytest.approx(found.communication_s - hidden)
    assert busy.total_s == busy.compute_s + busy.communication_s + busy.update_s


def test_the_update_is_shared_by_the_processes_of_zero_and_by_the_nodes_of_an_offload() -> None:
    assert moved("none").update_s == 40 * 32 / 1e3  # AdamW moves 32 bytes a parameter
    assert moved("zero1").update_s == moved("zero3").update_s == 40 / EIGHT * 32 / 1e3
    assert moved("zero2_offload").update_s == moved("zero3_offload").update_s == 40 / 2 * CPU_ADAM_S_PER_PARAMETER


def test_without_a_stage_a_step_is_that_of_plain_data_parallelism() -> None:
    of, on = work(MISTRAL, 64), machine("a100x8")
    assert step(of, on) == step(of, on, stage="none") != step(of, on, stage="zero3")
    asked = {**NOTHING, "num_prompts": 8, "new_tokens": 4}
    assert evaluation_time(of, on, **asked) == evaluation_time(of, on, **asked, stage="none")


def test_a_step_that_computes_nothing_reaches_no_share_of_the_peak() -> None:
    assert moved("none").efficiency == 0.0
    on_gpu = step(work(MISTRAL, 4096), machine("a100"), 2, 3)
    flops_of_step = 3 * 2 * 4096 * work(MISTRAL, 4096).flops_per_token
    assert on_gpu.efficiency == pytest.approx(flops_of_step / (312e12 * on_gpu.compute_s))


def test_the_volumes_are_those_of_the_zero_paper() -> None:
    """2 Ψ for data parallelism, stages 1 and 2, 3 Ψ for stage 3, × (N − 1)/N; Ψ is 14.5 GB, the link 240 GB/s."""
    psi = 2 * MISTRAL.num_parameters * 7 / 8 / 240e9
    hidden = 0.5 * 32 * 4 * 0.6e-3  # half of the time that launching the kernels takes
    for stage, volume in (("none", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)):
        assert exposed(stage) == pytest.approx(volume * psi - hidden, rel=0.02)


def test_micro_batches_cost_stages_two_and_three_but_not_one() -> None:
    assert exposed("none", 8) < exposed("none", 1)  # more computing to hide behind, the same to send
    assert exposed("zero1", 8) <= exposed("zero1", 1)
    assert exposed("zero2", 8) > 2 * exposed("zero2", 1)
    assert exposed("zero3", 8) > 7 * exposed("zero3", 1)


def test_stage_three_gathers_frozen_weights_too() -> None:
    assert exposed("zero3", method="lora") > 20 * exposed("zero2", method="lora")


def test_one_process_sends_nothing() -> None:
    assert step(work(MISTRAL), machine("a100")).communication_s == 0


def test_without_peer_to_peer_the_way_leads_through_main_memory_and_the_plan_says_so() -> None:
    direct, around = machine("rtx6000adax5"), machine("rtx4090x2")
    assert (direct.link, around.link) == (24e9, 12e9)
    assert any("no peer-to-peer" in note for note in around.notes)
    assert machine("h100x8").link == 370e9


def test_several_nodes_are_held_up_by_the_network_between_them() -> None:
    two = machine("h100x8", num_nodes=2)
    assert two.link == 1.5e9 and any("several nodes" in note for note in two.notes)


def test_offload_pays_for_adam_on_the_cpu() -> None:
    found = step(work(MISTRAL), machine("a100"), stage="zero2_offload")
    assert found.update_s == pytest.approx(7.24 * 2.5, rel=0.01)
    assert step(work(MISTRAL), machine("a100")).update_s == pytest.approx(7.24e9 * 32 / (2039e9 * 0.9), rel=0.01)


def test_eight_bit_moments_are_quicker_to_update_than_full_ones() -> None:
    quick, slow = (step(work(MISTRAL), machine("a100"), optimizer=o).update_s for o in ("adamw_8bit", "adamw"))
    assert quick < slow


def test_single_precision_is_slower_and_half_precision_is_what_a_t4_has() -> None:
    of = work(MISTRAL, 1024, "lora")
    assert step(of, machine("a100", "fp32"), 4).compute_s > 5 * step(of, machine("a100"), 4).compute_s
    assert machine("t4", "fp16").flops == 65e12


# --- measuring -------------------------------------------------------------------------------------------------

NOTHING: dict[str, Any] = {"tokens": 0, "num_prompts": 0, "prompt_tokens": 0, "new_tokens": 0, "batch_size": 8}


def measuring(of: Work, on: Machine, **how: Any) -> float:
    return evaluation_time(of, on, **{**NOTHING, **how})


def test_the_main_jobs_measurements_take_what_they_took() -> None:
    """The README's run of 2026-11-21: held-out loss 3.5 and 3.8 s, answers 29.1 s before and 15.4 s after training."""
    of = work(shape("smollm2_135m"), 256, "lora", False, trained_parameters=4_884_480, adapter_parameters=4_884_480)
    cpu = machine_of(HardwareSpec(name="cpu", accelerator="cpu", num_cpus=2), "bf16")
    assert cpu is not None
    answers = {"num_prompts": 40, "prompt_tokens": 66.4}
    loss = measuring(of, cpu, tokens=2655)
    before, after = (measuring(of, cpu, **answers, new_tokens=n) for n in (64, 31))
    assert loss == pytest.approx(3.65, rel=1 / 3)  # arithmetic alone, which is the mean of two machines
    assert before == pytest.approx(29.1, rel=0.05)
    assert after == pytest.approx(15.4, rel=0.1)
    assert 2 * loss + before + after == pytest.approx(51.8, rel=0.1)


def test_every_token_of_an_answer_is_a_pass_of_its_own() -> None:
    of, on = work(MISTRAL, 1024, "lora"), machine("h100")
    short, long = (measuring(of, on, num_prompts=40, new_tokens=n) for n in (64, 128))
    assert long == 2 * short
    assert short == pytest.approx(5 * 64 * 32 * 1.25e-3)
    assert measuring(of, on, num_prompts=41, new_tokens=64) == pytest.approx(short * 6 / 5)
    assert measuring(of, on, num_prompts=40, new_tokens=64, batch_size=40) == pytest.approx(short / 5)
    assert measuring(of, on, num_prompts=40, new_tokens=64, prompt_tokens=500) > short
    assert measuring(of, on, tokens=20_000) == pytest.approx(2 * measuring(of, on, tokens=10_000))


def test_the_weights_of_a_large_model_are_read_for_every_token() -> None:
    of = work(shape("llama2_70b"), 1024, "lora")
    read = 2 * shape("llama2_70b").num_parameters
    one = {"num_prompts": 1, "new_tokens": 1}
    assert measuring(of, machine("h200"), **one) == pytest.approx(max(80 * 1.25e-3, read / (4800e9 * 0.9)))
    cpu = machine_of(HardwareSpec(name="cpu", accelerator="cpu", num_cpus=64), "bf16")
    assert cpu is not None
    assert measuring(of, cpu, **one) == pytest.approx(read / 20e9, rel=0.05)


def test_processes_share_the_questions_and_zero_three_gathers_the_weights_for_every_token() -> None:
    of, one, eight = work(MISTRAL, 1024, "lora"), machine("a100"), machine("a100x8")
    asked = {"num_prompts": 64, "new_tokens": 10, "tokens": 8000}
    alone, shared = measuring(of, one, **asked), measuring(of, eight, **asked)
    assert shared == pytest.approx(alone / 8)
    gathered = 10 * 2 * MISTRAL.num_parameters * 7 / 8 / 240e9
    assert measuring(of, eight, **asked, stage="zero3") == pytest.approx(shared + gathered)
    assert measuring(of, eight, **asked, stage="zero2") == shared


def test_a_mask_costs_all_pairs_of_a_packed_row() -> None:
    """2·(b·s) keys for every token instead of s/2: Llama-3-8B, 8 × 4,096 packed, a forward and a backward pass."""
    words = ("model=llama3_8b", "method=full", "hw=h100", "train.max_length=4096", "train.gradient_checkpointing=false")
    kernel, mask = (
        attention_span(job_of(spec_of(*words, f"train.attention={attention}")), 8) for attention in ("varlen", "sdpa")
    )
    assert kernel is None and mask == 2 * 8 * 4096
    assert attention_span(job_of(spec_of("model=gemma2_2b", *words[1:])), 8) is None  # capped, each document's own
    llama = shape("llama3_8b")
    few, many = (
        flops_per_token(llama, 4096, method="full", trained_layers=32, checkpointing=False, span=span)
        for span in (kernel, mask)
    )
    assert many - few == pytest.approx(3 * 32 * 2 * 4096 * (mask - 4096))


def test_a_token_passes_every_layer_at_the_speed_of_its_method() -> None:
    one = {"num_prompts": 1, "new_tokens": 1}
    small = shape("smollm2_135m")
    cpu = machine_of(HardwareSpec(name="cpu", accelerator="cpu", num_cpus=2), "bf16")
    assert cpu is not None
    for method in METHODS:
        of = work(small, 16, method, False)
        read = max(of.weight_bytes / 20e9, of.flops_per_token / 2 / cpu.flops)
        layers = 30 * CPU_PASS_S.get(method, CPU_PASS_WITHOUT_ADAPTER_S)
        assert measuring(of, cpu, **one) == pytest.approx(layers + read), method
        assert measuring(of, machine("h100"), **one) == 30 * PASS_S.get(method, PASS_WITHOUT_ADAPTER_S), method


def test_the_loss_and_prompts_take_half_of_a_steps_operations() -> None:
    of, on = work(MISTRAL, 1024, "lora"), machine("a100")
    seconds = of.flops_per_token / 2 / (312e12 * 0.47)  # Qwen's LoRA on an A100
    assert measuring(of, on, tokens=1000) == pytest.approx(1000 * seconds)
    asked = {"num_prompts": 3, "prompt_tokens": 50}
    assert measuring(of, on, **asked) == pytest.approx(150 * seconds)
    cpu = machine_of(HardwareSpec(name="cpu", accelerator="cpu", num_cpus=4), "bf16")
    assert cpu is not None
    assert measuring(of, cpu, tokens=1000) == pytest.approx(1000 * of.flops_per_token / 2 / (4 * 130e9))
