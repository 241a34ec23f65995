"""Packed documents do not see one another; where a model would let them, packing is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from runner.errors import RequestError
from runner.train import packing_isolation, varlen_attention
from tests.conftest import spec_of, train_here
from tests.support import tiny_llama
from tests.support.processes import tiny_model, words

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
KEPT_APART: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen3": {"head_dim": 16}, "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16}, "phi": {}, "phi3": {}, "gpt2": GPT2, "gpt_neox": {},
    "gptj": GPT2 | {"rotary_dim": 8}, "mixtral": EXPERTS, "qwen3_moe": EXPERTS | {"head_dim": 16}, "olmoe": EXPERTS,
    "granitemoe": EXPERTS, "olmo2": {}, "cohere": {},
}  # fmt: skip
SEEN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "gpt_oss": EXPERTS | {"head_dim": 16}, "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 8, "head_dim": 16, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 64, "context_length": 64},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 32},
    "jamba": EXPERTS | {"mamba_d_state": 8, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "minimax": {"num_local_experts": 2},
}  # fmt: skip
BY_VERSION: dict[str, dict[str, Any]] = {
    # Falcon makes its mask with positions since transformers 5.24, and GPT-J takes any attention
    "falcon": {"head_dim": None}, "gptj": GPT2 | {"rotary_dim": 8}, "llama": {}, "opt": SEEN["opt"],
}  # fmt: skip
RAISE: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": STATES | {"attn_layer_indices": [1]},
    "falcon_h1": STATES | {"mamba_d_ssm": 128},
    "granitemoehybrid": STATES | {"layer_types": ["mamba", "attention"], "num_local_experts": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                   "hybrid_override_pattern": "M*"},
}  # fmt: skip


PACKS = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def found(
    name: str, more: dict[str, Any], dtype: torch.dtype = torch.bfloat16, varlen: bool = False
) -> str | None:  # fmt: skip
    """The fault of an untrained model of that architecture."""
    model = untrained(name, more, dtype)
    assert not varlen or varlen_attention.use(model)
    return fault_of(model)


def untrained(name: str, more: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, **{k: v for k, v in {**SIZES, **more}.items() if k not in more or v is not None}
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def fault_of(model: Any) -> str | None:
    with torch.no_grad():
        return packing_isolation.find_leak(model, PACKS, [0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KEPT_APART)
def test_models_that_keep_documents_apart_pass(name: str, dtype: torch.dtype) -> None:
    assert found(name, KEPT_APART[name], dtype) is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "olmoe"])
def test_attention_over_documents_keeps_them_apart(name: str) -> None:
    assert found(name, KEPT_APART[name], varlen=True) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SEEN)
def test_a_document_that_is_seen_by_the_next_is_found(name: str, dtype: torch.dtype) -> None:
    assert "moves the logits of the next" in (found(name, SEEN[name], dtype) or "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_whose_mask_does_not_look_at_positions_is_found(dtype: torch.dtype) -> None:
    """Whatever transformers' own models do: this one sees the whole row, and hands positions on."""

    class Unaware(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
            s = input_ids.shape[1]
            others["attention_mask"] = torch.ones(1, 1, s, s, dtype=torch.bool).tril()
            return super().forward(input_ids, **others)

    torch.manual_seed(0)
    model = Unaware(AutoConfig.for_model("llama", **SIZES, attn_implementation="sdpa")).to(dtype).eval()
    assert "moves the logits of the next" in (fault_of(model) or "")
    assert fault_of(LlamaForCausalLM(model.config).to(dtype).eval()) is None


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("name", BY_VERSION)
def test_a_fault_is_found_exactly_where_packed_losses_differ(name: str, varlen: bool) -> None:
    model = untrained(name, BY_VERSION[name])
    if varlen and not varlen_attention.use(model):
        pytest.skip(f"this version's {name} cannot take it")
    documents = [[3 + (7 * place + 11 * number) % 120 for place in range(16)] for number in range(3)]

    def loss(*some: list[int]) -> list[float]:
        """Of each document but its first token, whose label is no token's."""
        batch = PACKS(
            [{"input_ids": [token for one in some for token in one], "seq_lengths": [len(one) for one in some]}]
        )
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, :-1].float()
        each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        return [part[: len(one) - 1].mean().item() for one, part in zip(some, each.split(16), strict=True)]

    packed, alone = loss(*documents), [loss(one)[0] for one in documents]
    same = packed == pytest.approx(alone, abs=1e-5)
    assert same == (fault_of(model) is None)
    assert name not in ("llama", "opt") or same == (name == "llama")


def test_documents_of_gpt_oss_are_found_under_varlen_too() -> None:
    """Its masks are made without positions."""
    assert "moves the logits of the next" in (found("gpt_oss", SEEN["gpt_oss"], varlen=True) or "")


@pytest.mark.parametrize("name", RAISE)
def test_a_model_that_cannot_take_packed_documents_says_so(name: str) -> None:
    assert (found(name, RAISE[name]) or "").startswith(
        "ValueError: `causal_conv1d_fn` can't keep packed sequences apart"
    )


def test_documents_whose_positions_go_on_are_found() -> None:
    """Nothing is seen, but the second document stands where it would in one text."""

    class Placed(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.config = AutoConfig.for_model("llama", vocab_size=128)
            self.words, self.places = torch.nn.Embedding(128, 8), torch.nn.Embedding(64, 8)

        def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
            class Output:
                logits = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))

            return Output

    with torch.no_grad():
        fault = packing_isolation.find_leak(Placed(), DataCollatorForLanguageModeling(0, padding_free=True), [])
    assert "has other logits than alone" in (fault or "")


def opt(folder: Path) -> Path:
    """A small OPT with the tokenizer of `tiny_llama`."""
    tiny_llama.base(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model("opt", **{**SIZES, "vocab_size": tiny_llama.WORDS, **SEEN["opt"]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_packing_is_refused_before_the_first_step_and_the_remedy_works(objective: str, tmp_path: Path) -> None:
    base, rows = opt(tmp_path / "base"), tmp_path / "rows.jsonl"
    if objective == "sft":
        tiny_llama.rows(rows)
    else:
        rows.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"}) + "\n" for i in range(4, 40)))
    asked = [
        "model=hub", f"model.id={base}", "hw=cpu", "hw.num_cpus=1", "data=file", f"data.path={rows}",
        "train.precision=fp32", "train.max_length=32", "train.batch_size=2", "train.max_steps=2", "eval.num_prompts=0",
        f"objective={objective}", f"run.output_dir={tmp_path / 'runs'}",
    ]  # fmt: skip
    with pytest.raises(RequestError) as refused:
        train_here(spec_of(*asked))
    (problem,) = refused.value.problems
    assert "OPTForCausalLM with attention varlen cannot be trained on packed documents" in problem.what
    assert problem.remedy == "write train.packing=false" and not list(tmp_path.glob("runs/*/metrics.jsonl"))
    finished, _ = train_here(spec_of(*asked, "train.packing=false"))
    assert finished.summary["train"]["steps"] == 2


def test_the_proof_changes_nothing_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(*words(tiny_model(tmp_path / "model"), tmp_path / "runs", "hw.num_cpus=1", "method.dropout=0.1"))
    calls = []
    kept = packing_isolation.check_isolation
    monkeypatch.setattr(packing_isolation, "check_isolation", lambda *some: (kept(*some), calls.append(1)))
    _, proven = train_here(spec)
    monkeypatch.setattr(packing_isolation, "check_isolation", lambda *some: None)
    _, unproven = train_here(spec)
    losses = [[(line["loss"], line["grad_norm"]) for line in run.metrics()] for run in (proven, unproven)]
    assert losses[0] == losses[1] and calls == [1]
