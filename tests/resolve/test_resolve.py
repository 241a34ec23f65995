"""What is left at `auto` follows from the hardware, and the global batch stays what it was."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from runner.cli.options import request_of
from runner.config.command_line import Request
from runner.config.compose import compose
from runner.errors import RequestError
from runner.plan.auto_values import resolve_autos
from runner.plan.choose_stage import MAX_MICRO_BATCH
from runner.resolve import steps
from runner.spec import RunSpec
from tests.support.front import spec_of

pytestmark = pytest.mark.usefixtures("here")


def test_nothing_that_the_hardware_decides_is_left_open() -> None:
    train = spec_of("hw=cpu").train
    assert "auto" not in {str(value) for value in train.model_dump().values()}


@pytest.mark.parametrize(
    ("hw", "precision", "attention"),
    [
        ("h100", "bf16", "varlen"),
        ("rtx3090", "bf16", "varlen"),
        ("t4", "fp16", "varlen"),  # Turing: no bfloat16
        ("v100", "fp16", "varlen"),
        ("cpu", "bf16", "varlen"),  # tests.support.front.LAPTOP has bfloat16
    ],
)
def test_arithmetic_and_kernels_follow_the_hardware(hw: str, precision: str, attention: str) -> None:
    train = spec_of(f"hw={hw}").train
    assert (train.precision, train.attention) == (precision, attention)


def test_a_cpu_without_bfloat16_computes_in_fp32() -> None:
    assert spec_of("hw=cpu", "hw.bf16=false").train.precision == "fp32"


@pytest.mark.parametrize(
    "typed",
    ["train.precision=fp32", "train.attention=eager", "train.gradient_checkpointing=false", "train.liger=false"],
)
def test_what_was_typed_is_kept(typed: str) -> None:
    key, value = typed.removeprefix("train.").split("=")
    assert str(getattr(spec_of("hw=h100", typed).train, key)).lower() == value


def test_deepspeed_is_for_more_than_one_process() -> None:
    assert spec_of("hw=h100").deepspeed.name == "none"
    assert spec_of("hw=h100x3", "model=mistral7b", "method=full").deepspeed.name == "zero1"
    assert spec_of("hw=h100", "deepspeed=zero2").deepspeed.name == "zero2"


@pytest.mark.parametrize("gpus", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [1, 7, 16, 20, 48, 100])
def test_the_global_batch_is_kept_as_nearly_as_can_be(gpus: int, batch: int) -> None:
    spec, notes = resolve_autos(_undecided(gpus, batch_size=batch))
    micro, steps = spec.train.micro_batch_size, spec.train.accumulation_steps
    assert isinstance(micro, int) and isinstance(steps, int)
    possible = [m * s * gpus for m, s in itertools.product(range(1, MAX_MICRO_BATCH + 1), range(1, 101))]
    nearest = min(abs(total - batch) for total in possible)
    assert abs(micro * steps * gpus - batch) == nearest
    assert spec.train.batch_size == micro * steps * gpus  # what spec.json records is what runs
    if nearest:
        assert notes == [
            f"global batch {batch} rounded to {micro * steps * gpus} = {micro} × {steps} × {gpus} processes"
        ]
    else:
        assert notes == []


def test_the_same_recipe_takes_the_same_batch_on_other_hardware() -> None:
    totals = {gpus: resolve_autos(_undecided(gpus, batch_size=48))[0].train.batch_size for gpus in (1, 2, 3, 8)}
    assert set(totals.values()) == {48}


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        ({"micro_batch_size": 2}, (2, 8)),
        ({"accumulation_steps": 4}, (4, 4)),
        ({"micro_batch_size": 4, "accumulation_steps": 4}, (4, 4)),
        ({"micro_batch_size": 16}, (16, 1)),  # larger than auto would take
    ],
)
def test_one_half_of_the_batch_may_be_given(given: dict[str, int], pair: tuple[int, int]) -> None:
    train = resolve_autos(_undecided(1, batch_size=16, **given))[0].train
    assert (train.micro_batch_size, train.accumulation_steps) == pair


def test_a_batch_that_contradicts_its_halves_is_refused() -> None:
    undecided = _undecided(2, batch_size=16, micro_batch_size=3, accumulation_steps=3)
    with pytest.raises(RequestError) as caught:
        resolve_autos(undecided)
    (problem,) = caught.value.problems
    assert problem.what == (
        "train.micro_batch_size=3 × train.accumulation_steps=3 × 2 processes = 18, but train.batch_size=16"
    )
    assert problem.remedy == "write train.batch_size=18, or leave accumulation_steps at auto"


def test_resolving_twice_changes_nothing() -> None:
    once, _ = resolve_autos(_undecided(3, batch_size=16))
    assert resolve_autos(once) == (once, [])


@cache
def _on_h100() -> RunSpec:
    return compose(Request(overrides=("hw=h100",)))


def _undecided(gpus: int, **train: int) -> RunSpec:
    """A run on so many H100s, before anything is decided."""
    spec = _on_h100()
    changes = {"hw": spec.hw.model_copy(update={"num_gpus": gpus}), "train": spec.train.model_copy(update=train)}
    return spec.model_copy(update=changes)


def test_a_request_is_resolved_by_its_steps_in_order_and_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    kept = steps.validated
    monkeypatch.setattr(steps, "validated", lambda *given: seen.append("validated") or kept(*given))

    def told(step: steps.Step) -> steps.Step:
        def run(spec: RunSpec, resolution: steps.Resolution) -> RunSpec:
            seen.append(step.__name__)
            return step(spec, resolution)

        return run

    monkeypatch.setattr(steps, "STEPS", tuple(told(step) for step in steps.STEPS))
    steps.resolve(compose(Request()))
    assert seen == [
        "detect_hardware", "read_hostfile", "choose_attention", "read_deepspeed_json", "add_model_facts",
        "choose_place", "check_rules", "validated", "check_workspace", "choose_stage_and_batch", "choose_metric",
        "note_unread_keys", "size_pod",
    ]  # fmt: skip


def test_a_size_that_nobody_wrote_is_not_named_as_without_effect() -> None:
    """A CPU pod has no volume disk: that is said of a size that was typed, not of one that was decided."""
    words = ("where=runpod", "hw=cpu", "where.max_usd=1")
    for typed, said in (((), False), (("where.volume_gb=30",), True)):
        _, notes = steps.resolved(request_of((*words, *typed), ()))
        assert any("where.volume_gb has no effect" in note for note in notes) == said
