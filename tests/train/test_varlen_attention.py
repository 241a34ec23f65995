"""Attention over documents gives what a masked kernel gives, on every shape of model, without making a mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import (
    bidirectional_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from runner.train import model_loading, varlen_attention, varlen_kernels
from runner.train.varlen_kernels import Documents
from tests.conftest import spec_of

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 7}, "qwen3": {"head_dim": 16}, "phi": {}, "phi3": {},
    "gemma2": {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16},  # scores capped, layers take turns
    "gemma3_text": {"head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS | {"head_dim": 16}, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {}, "olmo2": {}, "cohere": {},
    "gpt_oss": EXPERTS | {"head_dim": 16, "sliding_window": 7},  # sinks
}  # fmt: skip
BY_VERSION: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2}, "doge": {}, "falcon": {},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
}  # fmt: skip
"""Whether these hand on their mask is up to the version of transformers: GPT-J does since 5.24."""


@cache
def pair(name: str) -> tuple[Any, Any]:
    """One untrained fp32 model under attention over documents, and with the same weights under a mask."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES | {**MODELS, **BY_VERSION}[name])
    eager = name in ("gemma2", "gpt_oss")  # whose softcap and sinks SDPA does not know
    masked = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eager else "sdpa")
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ours.load_state_dict(masked.state_dict())
    assert varlen_attention.use(ours) and ours.config._attn_implementation == "varlen"
    return ours.eval(), masked.eval()


@contextmanager
def no_mask() -> Iterator[None]:
    """Fails where the dense mask of SDPA is made."""
    with mock.patch.object(varlen_attention, "sdpa_mask", side_effect=AssertionError("a mask was made")):
        yield


def packed(lengths: list[int]) -> dict[str, Any]:
    """TRL's batch of one sequence that holds documents of these lengths, and padding after them."""
    ids = [[3 + (7 * i + 11 * n) % 120 for i in range(n)] for n in lengths]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
    return dict(collate([{"input_ids": [token for document in ids for token in document], "seq_lengths": lengths}]))


def padded(lengths: list[int], left: bool) -> dict[str, Any]:
    """A batch of one row per length, filled up to the longest."""
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.int64), torch.zeros(len(lengths), longest)
    for row, n in enumerate(lengths):
        place = slice(longest - n, longest) if left else slice(0, n)
        ids[row, place] = torch.tensor([3 + (7 * i + 11 * row) % 120 for i in range(n)])
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def compared(name: str, batch: dict[str, Any]) -> None:
    """Logits of real tokens, and gradients of all weights, are those of the masked kernel to 1e-5."""
    ours, masked = pair(name)
    labels = batch.pop("labels", None)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else batch["input_ids"] != 0
    results = []
    for model in (ours, masked):
        model.zero_grad()
        with no_mask() if model is ours else nullcontext():
            logits = model(**batch, use_cache=False).logits[real]
        weight = torch.linspace(-1, 1, logits.shape[-1])
        (logits * weight).sum().backward() if labels is None else (logits.softmax(-1) * weight).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), grads))
    (mine, grads), (theirs, expected) = results
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected.keys()
    for weight_name, grad in grads.items():
        scale = float(expected[weight_name].abs().max())
        torch.testing.assert_close(grad, expected[weight_name], atol=1e-5 * max(1.0, scale), rtol=1e-4)


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_packed_documents_give_what_a_mask_gives(name: str, lengths: list[int]) -> None:
    if name == "gpt_oss":
        lengths = lengths[:1]  # its own masks do not look at positions: documents see one another in both
    compared(name, packed(lengths))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(lengths=LENGTHS, left=st.booleans())
def test_padded_rows_give_what_a_mask_gives(name: str, lengths: list[int], left: bool) -> None:
    compared(name, padded(lengths, left))


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_give_the_same_gradients(reentrant: bool) -> None:
    model = pair("mistral")[0]
    batch, grads = packed([5, 20, 9]), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train().zero_grad()
        model(**batch, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-5)


def test_deepspeeds_hooks_hand_documents_on() -> None:
    """ZeRO-3 takes apart and puts together what every module is called with."""
    from deepspeed.runtime.zero.utils import apply_to_tensors_only

    documents = Documents((5, 3), (False, True), 4, torch.tensor([0, 5, 8]))
    found = apply_to_tensors_only(lambda tensor: tensor, {"attention_mask": documents})["attention_mask"]
    assert type(found) is Documents and found[:3] == documents[:3] and found.starts is documents.starts


@pytest.mark.parametrize(("s", "window"), [(300, None), (700, 100), (257, 256), (513, 300)])
def test_documents_of_several_blocks_give_what_a_mask_gives(s: int, window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, s, d, requires_grad=True) for heads, d in ((4, 16), (2, 16), (2, 8)))
    ours = varlen_kernels.Blockwise.apply(q, k, v, 0.25, window, (s,), False)
    place = torch.arange(s)
    distance = place[:, None] - place[None]
    mask = (distance >= 0) & (distance < (window or s))
    masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(ours, masked, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(ours)
    for mine, theirs in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(masked, (q, k, v), grad),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("s", [64, 256, 1024])
def test_blocks_in_bf16_are_as_exact_as_eager_attention(s: int, size: float) -> None:
    """Error of output and gradients against fp64, of queries and keys that are `size` in the mean: eager attention,
    whose softmax is in fp32, has 0.3 to 2.4 %."""
    errors = []
    mask = torch.zeros(s, s).masked_fill(~torch.ones(s, s).tril().bool(), float("-inf"))[None, None]
    layer = mock.Mock(num_key_value_groups=3, training=False)
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v, grad = (torch.randn(1, heads, s, 64, dtype=torch.bfloat16) for heads in (9, 3, 3, 9))
        q, k = size * q, size * k

        def both(attend: Any, dtype: torch.dtype, q: Any = q, k: Any = k, v: Any = v, grad: Any = grad) -> list[Any]:
            inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            out = attend(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

        exact = both(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, mask.double(), enable_gqa=True), torch.double
        )
        eager = both(
            lambda q, k, v: eager_attention_forward(layer, q, k, v, mask.to(q), 0.125)[0].transpose(1, 2),
            torch.bfloat16,
        )
        ours = both(
            lambda q, k, v: varlen_kernels.Blockwise.apply(q, k, v, 0.125, None, (s,), s <= varlen_kernels.BLOCK),
            torch.bfloat16,
        )
        errors.append([[float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]
                       for found in (ours, eager)])  # fmt: skip
    mine, theirs = torch.tensor(errors).mean(0)
    assert (mine < 1.15 * theirs).all() and mine.max() < 0.03, (mine, theirs)


# ── what is given to transformers ───────────────────────────────────────────────────────────────


def made(**changed: Any) -> Documents | torch.Tensor | None:
    """What the layers get in the mask's place for two rows of six tokens."""
    given = {"batch_size": 2, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False}
    return varlen_attention.documents_or_mask(**given | changed)


def test_what_is_no_document_gets_the_mask_of_sdpa() -> None:
    whole = Documents((6, 6), (False, False), None, None)
    assert made() == whole
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    for mask in (
        made(attention_mask=holes),  # padding in the middle: the rest looks across
        made(mask_function=bidirectional_mask_function),
        made(q_offset=2, kv_length=8),  # keys of a cache
        made(use_vmap=True),  # a function of the caller's own
    ):
        assert isinstance(mask, torch.Tensor) and mask.shape[:3] == (2, 1, 6)


def test_on_a_gpu_whole_rows_go_to_sdpa_without_a_mask(given: list[dict[str, Any]]) -> None:
    assert made(allow_is_causal_skip=True) is None


def test_a_window_is_kept_where_a_document_is_longer() -> None:
    for window, kept in ((3, 3), (6, None), (9, None)):
        function = sliding_window_causal_mask_function(window)
        assert made(mask_function=function, local_size=window) == Documents((6, 6), (False, False), kept, None)


def test_chunks_are_documents() -> None:
    left = torch.tensor([0, 1])
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    found = made(mask_function=chunked_causal_mask_function(4, left), attention_mask=real, local_size=4)
    assert found == Documents((4, 1, 1, 1, 4, 1), (False, False, True, True, False, False), None, None)


def test_generation_with_a_cache_gives_what_sdpa_gives() -> None:
    for name in ("llama", "mistral", "gemma2", "gpt_oss"):
        ours, masked = pair(name)
        batch = padded([9, 12], left=True)
        texts = [m.generate(**batch, max_new_tokens=6, do_sample=False).tolist() for m in (ours, masked)]
        assert texts[0] == texts[1], name


class ScoredAttention(LlamaAttention):
    """Attention of its own, that hands its mask to no interface."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **others: Any) -> Any:
        b, s, _ = hidden_states.shape
        q, k, v = (p(hidden_states).view(b, s, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attention_mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def keeps_what_transformers_takes(model: Any) -> bool:
    """The model does not take attention over documents, nothing of it is changed, and the run says so."""
    before = model.config._attn_implementation
    if varlen_attention.use(model):
        return False
    assert model.config._attn_implementation == before != "varlen"
    line = model_loading.another_attention(spec_of("hw=cpu", "train.attention=varlen"), model)
    assert line and line.startswith(f"Attends with {before}, not varlen, which layers of {type(model).__name__} cannot")
    assert model_loading.another_attention(spec_of("hw=cpu", "train.attention=eager"), model) is None
    return True


def test_models_that_do_not_hand_on_their_mask_keep_what_transformers_takes() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.model.layers[1].self_attn = ScoredAttention(model.config, 1)
    assert keeps_what_transformers_takes(model)
    assert model_loading.another_attention(spec_of("hw=cpu", "train.attention=varlen"), pair("llama")[0]) is None


@pytest.mark.parametrize("name", BY_VERSION)
def test_a_model_keeps_what_transformers_takes_or_gives_what_a_mask_gives(name: str) -> None:
    if keeps_what_transformers_takes(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | BY_VERSION[name]))
    ):
        return
    compared(name, packed([5, 20, 9]))
    for left in (False, True):
        compared(name, padded([9, 14, 3], left))


def test_short_rows_compute_their_scores_once_and_join_short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 256 tokens took longer than with eager attention: scores twice, and calls for every document."""
    computed = mock.Mock(wraps=varlen_kernels._shares)
    monkeypatch.setattr(varlen_kernels, "_shares", computed)
    for lengths, blocks in (([70, 50, 60, 30], 2), ([20] * 3 + [90, 10], 2), ([250], 1), ([200, 100], 2 * 2)):
        computed.reset_mock()
        s = sum(lengths)
        q = torch.randn(1, 4, s, 8, requires_grad=True)
        documents = Documents(tuple(lengths), (False,) * len(lengths), None, None)
        varlen_attention.attention(mock.Mock(), q, q[:, :2], q[:, :2], documents)[0].sum().backward()
        assert computed.call_count == blocks, lengths


@pytest.mark.parametrize("name", MODELS)
def test_environment_json_names_what_runs(name: str, request: pytest.FixtureRequest) -> None:
    """Not a kernel that capped scores and sinks do not reach."""
    extras = "products per document" if name in ("gemma2", "gpt_oss") else None
    model = pair(name)[0]
    assert varlen_attention.kernel(model, "bf16") == (extras or "blocks of products")
    request.getfixturevalue("given")
    assert varlen_attention.kernel(model, "bf16") == (extras or "torch flash, variable lengths")


# ── on a GPU ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of torch's flash kernel, on a machine that says that its CPU is a GPU of compute capability 9.0."""
    calls: list[dict[str, Any]] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any, **options: Any) -> torch.Tensor:
        calls.append({"shapes": [tuple(x.shape) for x in (q, k, v)], "dtype": q.dtype, "lengths": lengths} | options)
        return torch.zeros_like(q)

    monkeypatch.setattr(varlen_kernels, "varlen_attn", kernel)
    monkeypatch.setattr(varlen_kernels, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return calls


def test_the_flash_kernel_gets_boundaries_windows_and_few_keys(given: list[dict[str, Any]]) -> None:
    model = pair("mistral")[0]
    batch = {name: value for name, value in packed([5, 20, 9]).items() if name != "labels"}
    with no_mask(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**batch, use_cache=False)
    assert len(given) == 2  # layers
    starts = [0, 5, 25, 34, *range(35, 41)]  # the collator's padding: documents of one token
    for call in given:
        assert call["shapes"] == [(40, 4, 16), (40, 2, 16), (40, 2, 16)] and call["dtype"] == torch.bfloat16
        queries, keys, *longest = call["lengths"]
        assert queries.tolist() == keys.tolist() == starts and queries.dtype == torch.int32 and longest == [20, 20]
        assert (call["window_size"], call["enable_gqa"], call["scale"]) == ((6, 0), True, 0.25)


def test_padding_is_a_document_of_its_own_for_the_flash_kernel(given: list[dict[str, Any]]) -> None:
    with no_mask(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        pair("llama")[0](**padded([5, 9], left=False), use_cache=False)
    assert {(tuple(call["lengths"][0].tolist()), call["window_size"]) for call in given} == {((0, 5, 9, 18), (-1, 0))}


@pytest.mark.parametrize(
    ("name", "precision", "capability"),
    [("gemma2", torch.bfloat16, (9, 0)), ("llama", torch.float32, (9, 0)), ("llama", torch.float16, (7, 5))],
)
def test_what_the_flash_kernel_does_not_have_goes_to_the_next(
    name: str, precision: torch.dtype, capability: tuple[int, int], given: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    sdpa = mock.Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    with no_mask(), torch.autocast("cpu", precision, enabled=precision != torch.float32), torch.no_grad():
        pair(name)[0](**padded([5, 9, 9], left=False), use_cache=False)
    assert given == []
    calls = [(tuple(call.args[1].shape), call.args[3], call.kwargs["is_causal"]) for call in sdpa.call_args_list]
    one, two = ((1, 4, 5, 16), None, True), ((2, 4, 9, 16), None, True)  # neighbours of one length in one call
    assert calls == ([] if name == "gemma2" else [one, two] * 2)
