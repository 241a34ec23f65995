"""A GPU's memory, phase by phase: what is there in each, and what is laid over it.

The states by hand, from the bytes per value of ZeRO's paper (arXiv 1910.02054 §3: 16 bits and 4 + 8 in fp32) and of
8-bit optimisers (arXiv 2110.02861); what comes and goes is the tape's, which test_memory_tape.py holds to real models.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from runner.plan.autograd.ops import LayerKind, Setting
from runner.plan.autograd.step_peak import Step, TrainableLayers, patterns, replay_step
from runner.plan.host_memory import CPU_PROCESS
from runner.plan.memory import CPU_FIRST_USE, GIB, Job, Memory, floor, memory, reference_bytes, setting_of
from runner.plan.model_shape import Shape, shape_of
from runner.plan.trainable import Training, training_of
from runner.plan.zero import terms
from runner.plan.zero_config import resolved_config
from runner.spec import Freeze, Full, Lora, ModelSpec, QLora4, QLora8
from runner.spec.objective_base import Passes

TABLE = 100 * 64  # 100 words of 64 values: the embedding, and the head as well
LAYER = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # 4 heads, 2 of keys and values, of 16
SMALL = 3 * 2 * 64 + 64  # the norms
ALL = 2 * TABLE + 3 * LAYER + SMALL
LARGEST = 64 * 128
ADAPTER = 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # of rank 4
OVER = ("process", "collectives", "allocator_slack")


@pytest.fixture(scope="module")
def shape() -> Shape:
    facts = {
        "hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "vocab_size": 100, "context_length": 4096, "tie_embeddings": False,
    }  # fmt: skip
    made = shape_of(ModelSpec.model_validate({"id": "x/y", "name": "tiny", "architecture": "llama", **facts}))
    assert made.num_parameters == ALL
    return made


def job(**changes: Any) -> Job:
    usual: dict[str, Any] = {
        "seq": 16, "precision": "bf16", "checkpointing": False, "attention": "flash", "optimizer": "adamw",
        "on_gpu": True,
    }  # fmt: skip
    return Job(**usual | changes)


def tensors(found: Memory, phase: str) -> dict[str, float]:
    """A phase's terms without what no tensor shows."""
    return {name: size for name, size in found.phases[phase].items() if name not in OVER}


def zeroed(**zero: Any) -> Any:
    return {"zero_optimization": {"reduce_bucket_size": 500, **zero}, "gradient_accumulation_steps": 1}


def step_of(training: Training, asked: Job, micro: int = 2, has_gradients: bool = False) -> Step:
    return replay_step(training.shape, setting_of(training, asked, micro), training.trains, has_gradients)


def there(kinds: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in kinds.items() if size}


# --- the tape's view -----------------------------------------------------------------------------


def test_a_setting_has_everything_of_the_method(shape: Shape) -> None:
    method = QLora4(name="qlora4", rank=4, dropout=0.1, use_dora=True, target_modules=["q_proj", "up_proj"])
    training = training_of(shape, method, "bf16", deepspeed=False)
    found = setting_of(training, job(checkpointing=True, attention="eager", labelled=0.25), 3)
    assert found == Setting(
        b=3, s=16, width=2, autocast=True, trained_width=2, frozen_width=2, checkpointing=True, attention="eager",
        head="fused", labelled=0.25, rank=4, targets=frozenset({"q_proj", "up_proj"}), adapter_width=2, dropout=True,
        dora=True, peft=None, base="nf4",
    )  # fmt: skip
    whole = training_of(shape, Full(name="full"), "fp32", deepspeed=True)
    found = setting_of(whole, job(), 1)
    assert found == Setting(b=1, s=16, width=4, autocast=False, trained_width=4, frozen_width=4, adapter_width=4)
    other = replace(training, peft=(adapter := object()))  # type: ignore[arg-type]  # an odd one
    assert setting_of(other, job(), 1).peft is adapter
    assert {field.name for field in fields(Setting)} >= {"b", "s", "peft"}


@pytest.mark.parametrize(
    ("packed", "attention", "rows"), [(True, "flash", (1, 96)), (False, "flash", (6, 16)), (True, "scores", (6, 16))]
)
def test_a_packed_micro_batch_is_one_row(shape: Shape, packed: bool, attention: Any, rows: tuple[int, int]) -> None:
    """Two sequences a pair, three pairs; scores are computed by document."""
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    found = setting_of(training, job(packed=packed, attention=attention, passes=Passes(sequences=2)), 3)
    assert (found.b, found.s) == rows


@pytest.mark.parametrize(
    ("head", "on_gpu", "expected"),
    [
        ("own", True, "fused"), ("own", False, "labelled"), ("fused", False, "fused"), ("logits", True, "labelled"),
        ("number", True, "number"), ("number", False, "number"),
    ],
)  # fmt: skip
def test_the_head_is_the_objectives(shape: Shape, head: Any, on_gpu: bool, expected: str) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    assert setting_of(training, job(on_gpu=on_gpu, passes=Passes(head=head)), 1).head == expected


# --- without ZeRO --------------------------------------------------------------------------------


def test_full_training_holds_16_bytes_a_value(shape: Shape) -> None:
    """4 of weights and 8 of states always, 4 of gradients in the step; the rest is the tape's."""
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    found, one = memory(training, job(), 2, 1), step_of(training, job())
    fixed = {"trained_weights": 4.0 * ALL, "optimizer": 8.0 * ALL}
    assert tensors(found, "load") == {"trained_weights": 4.0 * ALL}
    assert tensors(found, "forward") == fixed | there(one.forward.kinds)
    assert tensors(found, "backward") == fixed | there(one.backward.kinds)
    assert tensors(found, "step") == fixed | {"gradients": 4.0 * ALL}
    assert tensors(found, "eval") == tensors(found, "save") == fixed
    assert found.host == 0 and found.peak_phase == "backward"
    assert floor(training, job()) == 12 * ALL
    half = training_of(shape, Full(name="full", master_weights=False), "bf16", deepspeed=False)
    assert tensors(memory(half, job(), 2, 1), "step") == {
        "trained_weights": 2.0 * ALL, "optimizer": 4.0 * ALL, "gradients": 2.0 * ALL,
    }  # fmt: skip


def test_an_adapter_has_states_of_its_own_values_alone(shape: Shape) -> None:
    training = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=False)
    found = memory(training, job(), 2, 1)
    fixed = {"frozen_weights": 2.0 * ALL, "trained_weights": 4.0 * ADAPTER, "optimizer": 8.0 * ADAPTER}
    assert tensors(found, "step") == fixed | {"gradients": 4.0 * ADAPTER}
    assert tensors(found, "load") == {"frozen_weights": 2.0 * ALL, "trained_weights": 4.0 * ADAPTER}
    copied = training_of(shape, Lora(name="lora", rank=4, modules_to_save=["lm_head"]), "bf16", deepspeed=False)
    states = tensors(memory(copied, job(), 2, 1), "step")
    assert states["optimizer"] == 8 * ADAPTER + 4 * TABLE  # in the width of their weight: the copy has 16 bits
    eighths = tensors(memory(copied, job(optimizer="adamw_8bit"), 2, 1), "step")["optimizer"]
    assert eighths == (2 + 8 / 256) * (ADAPTER + TABLE)  # whatever the width


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("sgd", 0), ("adafactor", 0.01), ("adamw_8bit", 2 + 8 / 256)])
def test_other_optimisers_hold_less(shape: Shape, optimizer: str, bytes_each: float) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    found = memory(training, job(optimizer=optimizer), 2, 1)
    assert tensors(found, "save").get("optimizer", 0) == pytest.approx(bytes_each * ALL)


def test_paged_states_lie_in_main_memory_but_for_the_weight_in_hand(shape: Shape) -> None:
    whole = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    for optimizer, each in (("paged_adamw", 8.0), ("paged_adamw_8bit", 2 + 8 / 256)):
        found = memory(whole, job(optimizer=optimizer), 2, 1)
        assert tensors(found, "save") == {"trained_weights": 4.0 * ALL}
        assert tensors(found, "step") == {
            "trained_weights": 4.0 * ALL, "gradients": 4.0 * ALL, "optimizer": each * LARGEST,
        }  # fmt: skip
        assert found.host == each * ALL
        assert floor(whole, job(optimizer=optimizer)) == 4 * ALL
    adapter = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=False)
    found = memory(adapter, job(optimizer="paged_adamw"), 2, 1)  # tensors of under 1e5 values stay
    assert tensors(found, "save")["optimizer"] == 8 * ADAPTER and found.host == 0


def test_gradients_of_earlier_micro_batches_are_there_from_the_second_on(shape: Shape) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    once, twice = memory(training, job(), 2, 1), memory(training, job(), 2, 2)
    one = step_of(training, job(), has_gradients=True)
    assert "gradients" not in tensors(once, "forward")
    assert tensors(twice, "forward")["gradients"] == tensors(twice, "backward")["gradients"] == 4.0 * ALL
    fixed = {"trained_weights": 4.0 * ALL, "optimizer": 8.0 * ALL, "gradients": 4.0 * ALL}
    assert tensors(twice, "backward") == there(one.backward.kinds) | fixed


def test_a_step_alone_counts_the_gradients_that_its_backward_pass_makes() -> None:
    """Few words and one short row: the peak is where the gradients of nearly all layers are there."""
    facts = {
        "hidden_size": 64, "intermediate_size": 128, "num_layers": 8, "num_heads": 4, "num_kv_heads": 2,
        "vocab_size": 50, "context_length": 4096, "tie_embeddings": False,
    }  # fmt: skip
    deep = shape_of(ModelSpec.model_validate({"id": "x/y", "name": "deep", "architecture": "llama", **facts}))
    training = training_of(deep, Full(name="full"), "bf16", deepspeed=False)
    alone = job(checkpointing=True)
    gradients = step_of(training, alone, 1).backward.kinds["gradients"]
    assert gradients > 0.9 * 4 * deep.num_parameters
    assert tensors(memory(training, alone, 1, 1), "backward")["gradients"] == gradients


def test_several_processes_hold_ddps_copy_of_the_gradients(shape: Shape) -> None:
    from accelerate import DistributedDataParallelKwargs

    assert DistributedDataParallelKwargs().gradient_as_bucket_view is False
    for method, size in ((Full(name="full"), 4.0 * ALL), (Lora(name="lora", rank=4), 4.0 * ADAPTER)):
        training = training_of(shape, method, "bf16", deepspeed=False)
        assert "ddp_buckets" not in memory(training, job(), 2, 1).phases["save"]
        found = memory(training, job(world=2), 2, 1)
        assert tensors(found, "save")["ddp_buckets"] == tensors(found, "step")["ddp_buckets"] == size


def test_a_reference_of_its_own_is_there_in_every_phase(shape: Shape) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    found = memory(training, job(passes=Passes(separate_reference=True)), 2, 1)
    assert reference_bytes(training) == 2 * ALL
    assert all(terms["reference"] == 2 * ALL for terms in found.phases.values())
    assert set(tensors(found, "load")) == {"trained_weights", "reference"}


# --- loading -------------------------------------------------------------------------------------


def test_quantising_borrows_for_the_largest_matrix(shape: Shape) -> None:
    """docs of quantization.largest_load_peak: 16 bits of it, and its scales in fp32 before they are quantised again."""
    training = training_of(shape, QLora8(name="qlora8", rank=4), "bf16", deepspeed=False)
    load = tensors(memory(training, job(), 2, 1), "load")
    assert load == {
        "frozen_weights": training.frozen_bytes, "trained_weights": 2.0 * ADAPTER, "largest_matrix": 4.0 * LARGEST,
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_under_zero_a_quantised_base_is_loaded_whole(shape: Shape, stage: str) -> None:
    training = training_of(shape, QLora4(name="qlora4", rank=4), "bf16", deepspeed=True)
    found = memory(training, job(world=2), 2, 1, stage, zeroed(stage=int(stage[4])))
    load = tensors(found, "load")
    assert load["weights"] == training.frozen_bytes + 2 * ADAPTER
    if stage == "zero3":
        assert tensors(found, "save")["weights"] < 0.6 * load["weights"]
    beside = memory(
        training, job(world=2, passes=Passes(separate_reference=True)), 2, 1, stage, zeroed(stage=int(stage[4]))
    )
    assert set(tensors(beside, "load")) == {"weights", "reference", "largest_matrix"}
    plain = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=True)
    shared = memory(plain, job(world=2), 2, 1, "zero3", zeroed(stage=3))
    assert tensors(shared, "load") == {"weights": (2.0 * ALL + 2 * ADAPTER) / 2}  # 16 bits are sharded as they come


# --- under ZeRO ----------------------------------------------------------------------------------


def test_zero2_has_masters_and_its_part_of_the_gradients(shape: Shape) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    found = memory(training, job(world=2), 2, 1, "zero2", zeroed(stage=2))
    one = step_of(training, job(world=2), has_gradients=True)
    fixed = {"weights": 2.0 * ALL, "master_weights": 2.0 * ALL, "optimizer": 4.0 * ALL}
    buckets = {"zero_buckets": 500 * 2}
    assert tensors(found, "load") == {"weights": 2.0 * ALL}
    assert tensors(found, "forward") == fixed | buckets | there(one.forward.kinds)
    gradients = {"gradients": 2.0 * ALL / 2 + 2 * LARGEST}
    assert tensors(found, "backward") == fixed | buckets | there(one.backward.kinds) | gradients
    assert tensors(found, "step") == fixed | {"gradients": 2.0 * ALL / 2, "zero_step": (2 + 4) * ALL / 2}
    assert tensors(found, "eval") == tensors(found, "save") == fixed
    assert found.host == 0
    assert floor(training, job(world=2), "zero2", zeroed(stage=2)) == 8 * ALL


def test_zero3_gathers_where_the_layers_run(shape: Shape) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    config = zeroed(stage=3, stage3_max_live_parameters=5000, stage3_max_reuse_distance=0)
    found = memory(training, job(world=2, eval_batch=1, eval_new_tokens=4), 2, 1, "zero3", config)
    gathered = 2.0 * (5000 + LARGEST)
    weights = 2.0 * ALL / 2 + 2 * SMALL  # norms are whole on every GPU
    once = {"gradients": 2.0 * ALL / 2, "zero_buckets": 500 * 2}  # allocated once: test_zero.py finds them after a step
    fixed = {"weights": weights, "master_weights": 2.0 * ALL, "optimizer": 4.0 * ALL} | once
    assert tensors(found, "save") == fixed
    assert fixed.items() <= tensors(found, "eval").items() and fixed.items() <= tensors(found, "forward").items()
    assert tensors(found, "backward")["gradients"] == 2.0 * ALL / 2 + 2 * LARGEST
    assert tensors(found, "step") == fixed | {"zero_step": (2 + 4) * ALL / 2}
    assert tensors(found, "load") == {"weights": weights}
    for phase in ("forward", "backward", "eval"):
        assert tensors(found, phase)["zero_gathered"] == gathered
    lora = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=True)
    small = memory(lora, job(world=2), 2, 1, "zero3", config)
    assert tensors(small, "save")["weights"] == (2.0 * ALL + 2 * ADAPTER) / 2  # nothing small trains
    assert tensors(small, "backward")["gradients"] == 2.0 * ADAPTER / 2  # and no gradient is beyond the bucket


@pytest.mark.parametrize(("stage", "parts"), [("zero1", 1), ("zero2", 2)])
def test_gradients_wait_for_the_next_micro_batch_in_parts_or_whole(shape: Shape, stage: str, parts: int) -> None:
    """ZeRO-1 reduces them in the last micro batch, ZeRO-2 in each (stage_1_and_2.py); test_zero.py finds as many."""
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    config = zeroed(stage=int(stage[4])) | {"gradient_accumulation_steps": 2}
    once = memory(training, job(world=2), 2, 1, stage, zeroed(stage=int(stage[4])))
    twice = memory(training, job(world=2), 2, 2, stage, config)
    assert "gradients" not in tensors(once, "forward")
    assert tensors(twice, "forward")["gradients"] == 2.0 * ALL / parts
    assert tensors(twice, "backward")["gradients"] > 2.0 * ALL / parts
    assert "gradients" not in tensors(twice, "eval")
    assert tensors(once, "step")["gradients"] == 2.0 * ALL / 2


def test_zero_is_told_what_is_frozen(shape: Shape) -> None:
    """Freezing: the layers that train are no frozen values; with an adapter all of the model is."""
    freeze = training_of(shape, Freeze(name="freeze", layers="last:2"), "bf16", deepspeed=True)
    trained = 2 * (LAYER + 2 * 64)
    asked: dict[str, Any] = {
        "config": zeroed(stage=3, stage3_max_live_parameters=90_000), "precision": "bf16", "optimizer_bytes": 8.0,
        "largest_layer_parameters": LARGEST,
    }  # fmt: skip
    for training, mine, others in (
        (freeze, trained, ALL - trained),
        (training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=True), ADAPTER, ALL),
    ):
        by_hand = terms(2, trainable=mine, frozen=others, frozen_bytes=2.0 * others,
                        largest_trained=LARGEST if mine == trained else 0, **asked)  # fmt: skip
        found = memory(training, job(world=2), 2, 1, "zero3", asked["config"])
        assert tensors(found, "forward")["zero_gathered"] == by_hand.gathered
        assert tensors(found, "backward")["gradients"] == by_hand.gradients
        assert tensors(found, "save")["weights"] == by_hand.weights


def test_zero_counts_the_optimiser_that_is_asked_and_the_precision(shape: Shape) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    found = memory(training, job(world=2, optimizer="sgd"), 2, 1, "zero2", zeroed(stage=2))
    assert "optimizer" not in tensors(found, "save")
    fp32 = training_of(shape, Full(name="full"), "fp32", deepspeed=True)
    found = memory(fp32, job(world=2, precision="fp32"), 2, 1, "zero2", zeroed(stage=2))
    assert tensors(found, "save")["weights"] == 4 * ALL and tensors(found, "step")["zero_step"] == 4 * ALL / 2


def test_what_zero_offloads_is_bytes_of_main_memory(shape: Shape) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    config = zeroed(stage=2, offload_optimizer={"device": "cpu", "pin_memory": False})
    found = memory(training, job(world=2), 2, 1, "zero2_offload", config)
    assert found.host == ALL / 2 * (4 + 4 + 2 + 8) + 2 * LARGEST
    assert tensors(found, "step") == {"weights": 2.0 * ALL}
    config = zeroed(stage=3, offload_optimizer={"device": "cpu", "pin_memory": False})
    assert memory(training, job(world=2), 2, 1, "zero3_offload", config).host == ALL / 2 * (2 + 4 + 4 + 8)


@pytest.mark.parametrize(("stage", "parts"), [("zero2", 1), ("zero3", 2), ("zero3_offload", 2)])
def test_zero3_shards_the_reference_too(shape: Shape, stage: str, parts: int) -> None:
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    config = zeroed(stage=int(stage[4]))
    asked = job(world=2, passes=Passes(separate_reference=True))
    found = memory(training, asked, 2, 1, stage, config)
    assert tensors(found, "load")["reference"] == tensors(found, "step")["reference"] == 2 * ALL / parts
    assert "reference" not in memory(training, job(world=2), 2, 1, stage, config).phases["step"]


# --- passes that keep nothing --------------------------------------------------------------------


def quiet(training: Training) -> TrainableLayers:
    return TrainableLayers(patterns(training.shape, lambda i: LayerKind()))


def test_a_pass_over_what_is_held_is_the_peak_where_it_is_higher(shape: Shape) -> None:
    """DPO: the reference's pass runs while the model's own activations are held; it is not checkpointed and has no
    adapter."""
    training = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=False)
    asked = job(checkpointing=True, passes=Passes(sequences=2, over_held=True), seq=64)
    found = memory(training, asked, 2, 1)
    one, bare = step_of(training, asked), replace(setting_of(training, asked, 2), rank=0, checkpointing=False)
    reads = replay_step(shape, bare, quiet(training)).forward
    both = {name: size + one.held.kinds[name] for name, size in reads.kinds.items()}
    assert sum(both.values()) > one.forward.total
    assert tensors(found, "forward") == tensors(found, "save") | there(both)
    without = memory(training, replace(asked, passes=Passes(sequences=2)), 2, 1)
    assert tensors(without, "forward") == tensors(found, "save") | there(one.forward.kinds)


def answers(training: Training, batch: int, prompt: int, new: int, attention: Any = "flash") -> dict[str, float]:
    """Keys and values of 3 layers × 2 heads × 16 in 16 bits for every token, and the pass that reads the prompts."""
    width = training.width
    setting = Setting(
        b=batch, s=prompt, width=width, autocast=training.autocast, trained_width=training.trained_width,
        frozen_width=width, attention=attention, head="labelled", labelled=1 / prompt, base=training.base,
    )  # fmt: skip
    kinds = replay_step(training.shape, setting, quiet(training)).forward.kinds
    return {"kv_cache": 2.0 * 3 * 2 * 16 * (prompt + new) * batch * width} | there(kinds)


def test_answering_prompts_is_a_phase(shape: Shape) -> None:
    """Prompts of 512 tokens at most; of the logits only those of each prompt's last token."""
    for training in (
        training_of(shape, Full(name="full"), "bf16", deepspeed=False),
        training_of(shape, Full(name="full"), "fp32", deepspeed=False),
        training_of(shape, QLora4(name="qlora4", rank=4), "bf16", deepspeed=False),
    ):
        for seq, prompt in ((16, 16), (512, 512), (513, 512), (2048, 512)):
            asked = job(seq=seq, eval_batch=3, eval_new_tokens=8, attention="eager")
            found = tensors(memory(training, asked, 1, 1), "eval")
            fixed = tensors(memory(training, asked, 1, 1), "save")
            assert found == fixed | answers(training, 3, prompt, 8, "eager")
    wide = training_of(replace(shape, vocab_size=20_000), Full(name="full"), "bf16", deepspeed=False)
    found = tensors(memory(wide, job(eval_batch=3, eval_new_tokens=8), 1, 1), "eval")
    assert {**answers(wide, 3, 16, 8)}.items() <= found.items()
    assert 3 * 20_000 * 2 <= found["head_and_loss"] <= 3 * 20_000 * 16  # 3 positions of 20,000 words


def test_generated_answers_count_where_they_are_higher_than_the_pass(shape: Shape) -> None:
    """Those to all prompts of an optimiser step at once: 5 × 24."""
    training = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=False)
    asked = job(seq=1024, passes=Passes(new_tokens=1000, head="number"), checkpointing=True)
    found = tensors(memory(training, asked, 5, 24), "forward")
    fixed = tensors(memory(training, asked, 5, 24), "save")
    expected = answers(training, 120, 24, 1000)
    assert sum(expected.values()) > step_of(training, asked, 5).forward.total
    assert found == fixed | expected | {"gradients": 4.0 * ADAPTER}
    few = tensors(memory(training, replace(asked, passes=Passes(new_tokens=1)), 1, 1), "forward")
    assert "kv_cache" not in few


def test_zero3_gathers_everything_to_generate(shape: Shape) -> None:
    training = training_of(shape, Lora(name="lora", rank=4), "bf16", deepspeed=True)
    asked = job(seq=1024, world=2, passes=Passes(new_tokens=1000, head="number"), checkpointing=True)
    config = zeroed(stage=3, stage3_max_live_parameters=5000, stage3_max_reuse_distance=0)
    found = tensors(memory(training, asked, 5, 24, "zero3", config), "forward")
    assert "kv_cache" in found and found["zero_gathered"] == 2.0 * ALL + 2 * ADAPTER
    assert found["gradients"] == 2.0 * ADAPTER / 2
    two = tensors(memory(training, asked, 5, 24, "zero2", zeroed(stage=2)), "forward")
    assert "kv_cache" in two and "zero_gathered" not in two


# --- what no tensor shows ------------------------------------------------------------------------


def test_the_peak_is_the_highest_phase_with_context_collectives_and_slack(shape: Shape) -> None:
    """The assumptions of the page (docs/planning.md), low, expected and high."""
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    for world in (1, 2):
        found = memory(training, job(world=world), 2, 1)
        sums = {phase: sum(tensors(found, phase).values()) for phase in found.phases}
        peak, constant = max(sums.values()), sums["save"]
        assert sums[found.peak_phase] == peak and found.peak_phase == "backward"
        for case, context, collectives, slack in (
            (found.low, 0.5, 0.2, 0.0), (found.expected, 0.65, 0.35, 0.04), (found.high, 0.9, 0.6, 0.15),
        ):  # fmt: skip
            outside = context + (collectives if world == 2 else 0.0)
            assert case == pytest.approx(peak + outside * GIB + slack * (peak - constant), abs=1)
        for phase, size in sums.items():
            over = {name: found.phases[phase].get(name) for name in OVER}
            moving = 0 if phase == "load" else size - constant
            assert over["process"] == pytest.approx(0.65 * GIB)
            assert over["collectives"] == (pytest.approx(0.35 * GIB) if world == 2 else None)
            assert over["allocator_slack"] == (pytest.approx(0.04 * moving) if moving else None)


def test_loading_has_no_slack_though_it_is_the_peak(shape: Shape) -> None:
    training = replace(training_of(shape, QLora4(name="qlora4", rank=4), "bf16", deepspeed=False), load_extra=1e9)
    found = memory(training, job(), 1, 1)
    assert found.peak_phase == "load" and "allocator_slack" not in found.phases["load"]
    size = training.frozen_bytes + 2 * ADAPTER + 1e9
    assert found.high == pytest.approx(size + 0.9 * GIB) and found.low == pytest.approx(size + 0.5 * GIB)


def test_on_a_cpu_the_process_is_memory_and_glibc_keeps_what_is_freed(shape: Shape) -> None:
    """2.3 times what comes and goes, 1.2 GiB at most (the main job's own run; see CPU_SLACK)."""
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=False)
    for micro, world in ((2, 1), (5000, 2)):
        found = memory(training, job(on_gpu=False, world=world), micro, 1)
        sums = {phase: sum(tensors(found, phase).values()) for phase in found.phases}
        peak = sums[found.peak_phase]
        moving = peak - sums["save"]
        process = CPU_PROCESS + CPU_FIRST_USE
        assert found.low == pytest.approx(peak + process)
        assert found.expected == pytest.approx(peak + process + min(2.3 * moving, 1.2 * GIB))
        assert found.high == pytest.approx(peak + process + min(3 * moving, 2 * GIB))
        assert found.phases["save"]["process"] == process and "collectives" not in found.phases["save"]
    assert 2.3 * moving > 1.2 * GIB and 3 * moving > 2 * GIB  # beyond both limits; two rows are within


def test_the_resolved_json_of_the_stage_is_what_counts(shape: Shape) -> None:
    """`gradient_accumulation_steps` of the JSON: ZeRO-2 keeps the accumulated part beside the new one."""
    training = training_of(shape, Full(name="full"), "bf16", deepspeed=True)
    config = resolved_config(
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}, "gradient_accumulation_steps": "auto"},
        micro_batch=2, accumulation=2, world=2, hidden_size=64, precision="bf16", max_grad_norm=1.0,
    )  # fmt: skip
    found = memory(training, job(world=2), 2, 2, "zero2", config)
    assert tensors(found, "backward")["gradients"] == 2 * 2.0 * ALL / 2 + 2 * LARGEST
