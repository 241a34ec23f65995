"""Experts in 4 and 8 bits: bytes, loading, products and gradients, beside a plain model of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.simulate import LiveBytes
from runner.plan import model_shape as shapes
from runner.plan.model_shape import shape_of
from runner.plan.trainable import Training, training_of
from runner.resolve import fit
from runner.spec import RunSpec
from runner.train import adapter_config, model_loading, quantised_experts
from runner.train.merge import proof
from tests.conftest import spec_of
from tests.plan.test_quantization import model_bytes
from tests.support import tiny_llama
from tests.train.test_experts import EXPERTS

MIXTURES: dict[str, dict[str, Any]] = {"mixtral": EXPERTS, "qwen3_moe": EXPERTS | {"head_dim": 16}}
QUANTISED = ("method=qlora4", "method=qlora4 method.double_quant=false", "method=qlora8")
IDS = torch.tensor([[5, 9, 33, 1, 6, 10, 34, 1, 40, 41]])


class Loading(LiveBytes):
    """Counts what is there, not the sizes on the meta device."""

    def count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            super().count(tensor)


@pytest.fixture(autouse=True)
def pefts_own() -> Iterator[None]:
    """What a quantised model does to PEFT stays in this file."""
    before = ParamWrapper.get_param, ParamWrapper._activate_lora
    yield
    ParamWrapper.get_param, ParamWrapper._activate_lora = before


def loaded(folder: Path, family: str, *words: str, **sizes: Any) -> tuple[RunSpec, Any]:
    asked = tiny_llama.words(folder, tied=False, architecture=family, **MIXTURES[family], **sizes)
    spec = spec_of(*asked, *words)
    return spec, model_loading.load_model(spec, str(folder / "base"))


def planned(spec: RunSpec) -> Training:
    assert spec.train.precision != "auto"
    return training_of(shape_of(spec.model), spec.method, spec.train.precision, deepspeed=False)


def plain(folder: Path, quantised: Any, dtype: torch.dtype) -> Any:
    """A model without quantised parameters, but of the weights that they stand for."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            for own, parameter in quantised_experts.parameters(module).items():
                getattr(model.get_submodule(name), own).copy_(quantised_experts.unpacked(parameter))
            if proof.quantised(module):
                model.get_submodule(name).weight.copy_(proof.dequantised(module))
    return model


@pytest.mark.parametrize("words", QUANTISED)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_holds_exactly_the_bytes_of_the_plan(family: str, words: str, tmp_path: Path) -> None:
    spec, model = loaded(tmp_path, family, *words.split())
    assert model_bytes(model) == planned(spec).frozen_bytes
    assert sum(len(quantised_experts.parameters(module)) for module in model.modules()) == 6


@pytest.mark.parametrize("words", QUANTISED)
def test_16_bit_experts_of_more_than_one_parameter_are_never_there_together(words: str, tmp_path: Path) -> None:
    """The peak of loading is the plan's: what is done, and one parameter before and while it is quantised."""
    wide = {"intermediate_size": 512}
    spec, _ = loaded(tmp_path, "mixtral", *words.split(), **wide)
    counter = Loading()
    with counter:
        model = model_loading.load_model(spec, str(tmp_path / "base"))
    plan = planned(spec)
    peak = plan.frozen_bytes + plan.load_extra
    assert 0.8 * peak < max(counter.peaks.values()) <= 1.01 * peak
    assert model_bytes(model) == plan.frozen_bytes


def test_a_16_bit_mixture_computes_as_transformers_has_it(tmp_path: Path) -> None:
    _, model = loaded(tmp_path, "mixtral", "method=lora")
    assert model.config._experts_implementation == "grouped_mm"
    assert not any(quantised_experts.parameters(module) for module in model.modules())


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("method", ["qlora4", "qlora8"])
@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_are_those_of_a_plain_model_of_the_same_weights(
    family: str, method: str, rank: int, tmp_path: Path
) -> None:
    spec, model = loaded(tmp_path, family, f"method={method}", "train.precision=fp32", f"method.rank={rank}")
    other = plain(tmp_path, model, torch.float32)
    if method == "qlora8":  # its linear layers also round their inputs
        for name, module in list(model.named_modules()):
            if proof.quantised(module):
                model.set_submodule(name, other.get_submodule(name))
    found = []
    for each in (model, other):
        torch.manual_seed(0)
        adapted: Any = get_peft_model(each, adapter_config.adapter_config(spec, each))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, and then nothing would be learnt of A
                nn.init.normal_(parameter, std=0.1)
        adapted(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and any("experts" in name for name in ours)
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_a_product_keeps_nothing_of_its_weight(tmp_path: Path) -> None:
    _, model = loaded(tmp_path, "mixtral", "method=qlora4")
    experts = model.model.layers[0].mlp.experts
    rows = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    out = quantised_experts._Product.apply(rows, experts, experts.gate_up_proj, offsets)
    assert [tuple(kept.shape) for kept in out.grad_fn.saved_tensors] == [(4,)]


def test_a_parameter_too_large_for_the_kernels_stays_in_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the layer's experts do not, and both compute and train together."""
    most = 4 * 128 * 64  # of Mixtral's down_proj here; gate_up_proj has twice as many values
    for place in (shapes, quantised_experts):
        monkeypatch.setattr(place, "MOST_VALUES", most)
    shapes._shape.cache_clear()
    spec, model = loaded(tmp_path, "mixtral", "method=qlora4")
    assert [*quantised_experts.parameters(model.model.layers[0].mlp.experts)] == ["down_proj"]
    assert model_bytes(model) == planned(spec).frozen_bytes
    shapes._shape.cache_clear()
    adapted: Any = get_peft_model(model, adapter_config.adapter_config(spec, model))
    adapted(IDS, labels=IDS).loss.backward()
    trained = [p for name, p in adapted.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(trained) == 6 and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_mixtral_fits_where_the_usual_table_says() -> None:
    """8x7B: 32 GB with 4 bits, 80 with 8 (LLaMA-Factory's table of memory by method and size)."""
    table = fit.memory_table(spec_of("model=mixtral_8x7b", "hw=h200", "train.max_length=1024"), ["mixtral_8x7b"])
    cells = {row["method"]: row["cells"][0] for row in table["rows"]}
    assert cells["QLoRA, 4 bits"] * 1.024**3 <= 32 and cells["QLoRA, 8 bits"] * 1.024**3 <= 80
