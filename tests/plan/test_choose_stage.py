"""ZeRO stage, micro batch and checkpointing that `auto` takes: the fastest with headroom, found by few plans."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from runner.config import deepspeed_json
from runner.config.command_line import Request
from runner.config.compose import compose
from runner.errors import RequestError
from runner.plan.auto_values import resolve_autos, resolve_hardware_autos
from runner.plan.choose_stage import CHECKPOINTING, NOISE, StageChoice, StageSearch, allowed_stages, batches
from runner.plan.model_shape import shape_for
from runner.resolve import fit
from runner.spec import Peft, RunSpec
from tests.conftest import spec_of

AUTO = "train.gradient_checkpointing=auto"


def asked(*words: str) -> RunSpec:
    """What is asked for, with sequences of 1,024 tokens, 16 a step; what the hardware decides is decided."""
    spec = fit.with_default_length(compose(Request(overrides=words)), {})
    return resolve_hardware_autos(spec)


class Counting(StageSearch):
    """Counts what is worked out."""

    def __init__(self) -> None:
        super().__init__(deepspeed_json.deepspeed_templates())
        self.computed = 0

    def choice(self, *arguments: Any) -> StageChoice:
        self.computed += 1
        return super().choice(*arguments)


def everything(spec: RunSpec, stage: str) -> list[StageChoice]:
    """Every micro batch of the best rounding with every checkpointing."""
    search, shape, world = Counting(), shape_for(spec), spec.hw.world_size
    off = {pair: abs(pair[0] * pair[1] * world - spec.train.batch_size) for pair in batches(spec)}
    pairs = [pair for pair in batches(spec) if off[pair] == min(off.values())]
    return [search.choice(spec, shape, stage, *pair, every) for pair in pairs for every in CHECKPOINTING]


RUNS = [
    ("qwen3_8b", "lora", "rtx4090", 4),  # between all and none
    ("llama3_8b", "lora", "h100", 0),
    ("llama3_3_70b", "qlora4", "h100", 1),  # large micro batches, as each unpacks all weights
    ("qwen3_1_7b", "qlora4", "rtx4090", 4),
    ("olmo2_13b", "lora", "v100", 1),
    ("mistral7b", "full", "rtx6000adax5", 2),
    ("qwen2_5_7b", "full", "h100x8", 0),
    ("phi2", "qlora8", "rtx4090x2", 0),
]


@pytest.mark.parametrize(("model", "method", "hw", "every"), RUNS)
def test_the_fastest_with_headroom_is_taken(model: str, method: str, hw: str, every: int) -> None:
    spec, search = asked(f"model={model}", f"method={method}", f"hw={hw}"), Counting()
    found = search.best(spec)
    options = {stage: [o for o in everything(spec, stage) if o.comfortable] for stage in allowed_stages(spec)}
    fastest = {stage: min(o.seconds_per_sequence for o in some) for stage, some in options.items() if some}
    assert found.comfortable and found.checkpointing == every
    assert found.seconds_per_sequence == pytest.approx(fastest[found.stage])
    assert found.seconds_per_sequence <= NOISE * min(fastest.values())
    assert search.computed <= 24 * len(options) / 2


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora4", "qlora8", "oft"])
@pytest.mark.parametrize("model", ["llama3_1_8b", "gemma3_1b", "mixtral_8x7b", "phi2"])
def test_fewer_layers_checkpointed_need_no_less_and_take_no_longer(model: str, method: str) -> None:
    spec, search = asked(f"model={model}", f"method={method}", "hw=h200"), Counting()
    each = [search.choice(spec, shape_for(spec), "none", 4, 4, every) for every in CHECKPOINTING]
    for more, less in pairwise(each):
        assert more.memory.high >= less.memory.high
        assert more.step is not None and less.step is not None and more.step.total_s <= less.step.total_s


def taken(*words: str, method: Peft | None = None, **hw: Any) -> tuple[bool | int | str, str]:
    """What `auto` took, and the note that says why."""
    spec = asked(*words)
    spec = spec.model_copy(update={"hw": spec.hw.model_copy(update=hw), "method": method or spec.method})
    ready, notes = resolve_autos(spec, Counting())
    return ready.train.gradient_checkpointing, next((n for n in notes if n.startswith(AUTO)), "")


def test_the_note_says_why() -> None:
    assert taken("model=llama3_8b", "method=lora", "hw=h200") == (False, f"{AUTO} took false: all fits with headroom")
    every, note = taken("model=qwen3_8b", "method=lora", "hw=rtx4090")
    assert every == 4 and note.startswith(f"{AUTO} took 4: without it a micro batch of 1 needs ")
    assert float(note.split()[-4]) > 24
    every, note = taken("model=olmo2_13b", "method=lora", "hw=v100")
    assert every is True and " took true: without it " in note


def test_where_nobody_knows_that_it_fits_every_layer_is_checkpointed() -> None:
    assert taken("model=llama3_8b", "method=lora", "hw=h200", memory_gib=None)[0] is True
    hra = Peft(name="hra", peft_type="HRA", arguments={"r": 8}, trainable="r * inputs")
    assert taken("model=llama3_8b", "hw=h200", method=hra) == (True, f"{AUTO} took true: memory is a lower bound")
    spec, _ = resolve_autos(asked("hw=h200"), None)  # a model whose shape is not known
    assert spec.train.gradient_checkpointing is True
    nothing = taken("model=llama2_70b", "method=full", "hw=rtx4090")
    assert nothing[0] is True


def test_a_cpu_checkpoints_nothing_and_a_typed_value_is_kept() -> None:
    assert taken("model=llama3_8b", "method=lora", "hw=cpu") == (False, "")
    for word, value in (("true", True), ("false", False), ("3", 3), ("1", True), ("0", False)):
        for hw in ("h200", "rtx4090", "cpu"):
            found = spec_of("model=llama3_8b", "method=lora", f"hw={hw}", f"train.gradient_checkpointing={word}")
            assert found.train.gradient_checkpointing is value


def test_the_choice_is_what_the_run_then_is_planned_with() -> None:
    spec = asked("model=llama3_8b", "method=lora", "hw=rtx4090")
    best = Counting().best(spec)
    ready, _ = resolve_autos(spec, Counting())
    again = Counting().best(ready)
    assert again == replace(best, config=again.config)


def test_every_nth_layer_of_fewer_is_refused() -> None:
    """It would recompute the first alone."""
    words = ("model=llama3_8b", "method=lora", "hw=h200")
    with pytest.raises(RequestError, match="=33: llama3_8b has 32 layers") as caught:
        resolve_autos(asked(*words, "train.gradient_checkpointing=33"), Counting())
    assert str(caught.value.problems[0].remedy).startswith("write train.gradient_checkpointing=auto")
    resolve_autos(asked(*words, "train.gradient_checkpointing=32"), Counting())
