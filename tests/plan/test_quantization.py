"""The arithmetic of quantised weights against the tensors that bitsandbytes really holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from runner.plan import quantization
from runner.plan.architectures import TRAITS
from runner.plan.model_shape import LayerShape, Matrix, Shape

SIZES = [(576, 1536), (512, 1792), (64, 64), (100, 130), (130, 100), (33, 64), (2048, 16)]


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Every tensor of a QuantState, the nested one's too."""
    own = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return own + (tensors_of(state.state2) if state.state2 is not None else [])


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and of what bitsandbytes keeps beside them."""
    tensors: list[torch.Tensor] = []
    for module in model.modules():
        tensors += module.parameters(recurse=False)
        for parameter in module.parameters(recurse=False):
            if getattr(parameter, "quant_state", None) is not None:
                tensors += tensors_of(parameter.quant_state)
            tensors += [parameter.scales] if hasattr(parameter, "scales") else []  # experts in 8 bits
        if isinstance(module, bnb.nn.Linear8bitLt):
            tensors += [t for t in (*vars(module.weight).values(), *vars(module.state).values()) if torch.is_tensor(t)]
    return held(tensors)


def linear4bit(inputs: int, outputs: int, double_quant: bool, storage: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double_quant,
        quant_type="nf4", quant_storage=storage,
    )  # fmt: skip
    return layer.to(torch.bfloat16).to("cpu")


def linear8bit(inputs: int, outputs: int) -> bnb.nn.Linear8bitLt:
    layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
    return layer.to(torch.bfloat16).to("cpu")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_4_bit_layer_holds_exactly_these_bytes(inputs: int, outputs: int, double_quant: bool) -> None:
    for storage in (torch.bfloat16, torch.uint8):
        layer = linear4bit(inputs, outputs, double_quant, storage)
        assert quantization.nf4_bytes(
            inputs, outputs, double_quant=double_quant, bytes_storage=storage.itemsize
        ) == model_bytes(layer)


def test_no_table_of_a_4_bit_layer_is_shared_with_another() -> None:
    both = torch.nn.ModuleList([linear4bit(128, 64, True, torch.bfloat16) for _ in range(2)])
    assert model_bytes(both) == 2 * quantization.nf4_bytes(128, 64)
    assert held([bnb.functional.name2qmap["dynamic"]]) == quantization.SHARED_CODE_2


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_an_8_bit_layer_holds_exactly_these_bytes_before_and_after_its_first_pass(inputs: int, outputs: int) -> None:
    layer = linear8bit(inputs, outputs)
    assert model_bytes(layer) == quantization.int8_bytes(inputs, outputs)
    layer(torch.randn(3, inputs, dtype=torch.bfloat16))
    assert model_bytes(layer) == quantization.int8_bytes(inputs, outputs)


def product_4bit(inputs: torch.Tensor, layer: bnb.nn.Linear4bit) -> torch.Tensor:
    return bnb.matmul_4bit(inputs, layer.weight, quant_state=layer.weight.quant_state)


def product_8bit(inputs: torch.Tensor, layer: bnb.nn.Linear8bitLt) -> torch.Tensor:
    """As on a GPU: on a CPU `Linear8bitLt` takes another function in training."""
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    return MatMul8bitLt.apply(inputs, layer.weight, None, None, layer.state)


def test_4_bit_products_keep_nothing_but_the_weight_for_backward() -> None:
    layer = linear4bit(64, 96, True, torch.bfloat16)
    node = product_4bit(torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True), layer).grad_fn
    kept = [t for t in (*node.tensors, *node.saved_tensors) if t is not None]
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]
    assert quantization.saved_nf4(16, 64) == 0


@pytest.mark.parametrize("outliers", [0, 3])
def test_8_bit_products_keep_their_input_and_its_outlier_columns(outliers: int) -> None:
    inputs = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    inputs[0, 0, :outliers] = 7.0  # beyond the threshold of 6
    node = product_8bit(inputs.requires_grad_(), linear8bit(64, 96)).grad_fn
    kept = [t for t in (*node.tensors, *node.tensor_states) if t is not None]
    assert held(kept) == quantization.saved_int8(16, 64, outliers=outliers)


@pytest.mark.parametrize(("kind", "survives"), [("nf4", False), ("int8", True)])
def test_checkpointing_does_not_free_the_input_of_an_8_bit_product(kind: str, survives: bool) -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    layer = linear4bit(64, 96, True, torch.bfloat16) if kind == "nf4" else linear8bit(64, 96)

    def block(x: torch.Tensor) -> torch.Tensor:
        inner = x * 2
        alive.append(weakref.ref(inner))
        return product_4bit(inner, layer) if kind == "nf4" else product_8bit(inner, layer)

    out = checkpoint(block, torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True), use_reentrant=False)
    assert (alive[0]() is not None) is survives
    out.float().sum().backward()


def tiny_shape(config: LlamaConfig) -> Shape:
    h, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    names = [("q_proj", h, h), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", h, h)]
    names += [("gate_proj", h, f), ("up_proj", h, f), ("down_proj", f, h)]
    matrices = tuple(Matrix(n, i, o, bias=config.mlp_bias and n[0] in "gud") for n, i, o in names)
    return Shape(
        traits=TRAITS["llama"], layers=(LayerShape(matrices, 2 * h),) * config.num_hidden_layers,
        hidden_size=h, intermediate_size=f,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        vocab_size=config.vocab_size, context_length=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        final_norm_parameters=h,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied-with-bias"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shape]:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=301, max_position_embeddings=64, tie_word_embeddings=request.param, mlp_bias=request.param,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder, tiny_shape(config)


@pytest.mark.parametrize("method", ["full", "lora", "qlora4", "qlora4-single", "qlora8"])
def test_a_model_loaded_by_transformers_holds_exactly_base_bytes(tiny: tuple[Path, Shape], method: Any) -> None:
    folder, shape = tiny
    double_quant = method == "qlora4"
    options: dict[str, Any] = {}
    if method.startswith("qlora4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
        )  # fmt: skip
        method = "qlora4"
    elif method == "qlora8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    assert model_bytes(model) == quantization.base_bytes(shape, method, double_quant=double_quant)


def test_bits_per_parameter_are_those_of_the_paper() -> None:
    """QLoRA (arXiv 2305.14314), section 3: double quantisation brings 0.5 bits of scales down to 0.127."""
    values = 4096 * 14336
    assert 8 * quantization.nf4_bytes(4096, 14336, double_quant=False) / values == pytest.approx(4.5, abs=0.001)
    assert 8 * quantization.nf4_bytes(4096, 14336) / values == pytest.approx(4.127, abs=0.001)


def test_experts_held_as_one_tensor_stay_in_16_bits_and_listed_ones_do_not() -> None:
    one_tensor = Matrix("experts", 64, 128, count=8, linear=False)
    listed = Matrix("experts", 64, 128, count=8)
    assert quantization.matrix_bytes(one_tensor, "qlora4") == 2 * 8 * 64 * 128
    assert quantization.matrix_bytes(listed, "qlora4") == 8 * quantization.nf4_bytes(64, 128)
    assert quantization.matrix_bytes(listed, "qlora8") == 8 * (64 * 128 + 4 * 128)


def test_loading_borrows_for_the_largest_quantised_matrix_only() -> None:
    matrices = (Matrix("q", 64, 64), Matrix("up", 64, 128), Matrix("experts", 64, 9999, linear=False))
    shape = Shape(
        traits=TRAITS["llama"], layers=(LayerShape(matrices, 128),) * 2, hidden_size=64,
        intermediate_size=128, num_heads=4, num_kv_heads=4, head_dim=16,
        vocab_size=100, context_length=64, tie_embeddings=True, final_norm_parameters=64,
    )  # fmt: skip
    values = 64 * 128
    assert quantization.largest_load_peak(shape, "qlora4", double_quant=False) == 2 * values
    assert quantization.largest_load_peak(shape, "qlora4") == 2 * values + 8 * values // 64
    assert quantization.largest_load_peak(shape, "qlora8") == 4 * values
