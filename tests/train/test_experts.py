"""Adapters of mixtures whose experts are one parameter (transformers 5): trained, merged, exported, opened again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.matrix_ranks import rewind
from runner.errors import RequestError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.train.export import export
from runner.train.merge import proof
from tests.conftest import train_here
from tests.support import tiny_llama
from tests.train.test_merge import ALL, exact, merge, spec

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}  # as these are published: there is no `num_experts`
HYBRID = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "shared_intermediate_size": 32,
    "layer_types": ["mamba", "attention", "attention"],
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
ATTENTION = "method.target_modules=[q_proj,v_proj]"
ASKED = [
    ("mixtral", EXPERTS, ()),
    ("mixtral", EXPERTS, (ATTENTION,)),
    ("mixtral", EXPERTS, ("method=qlora4",)),
    ("mixtral", EXPERTS, ("method=qlora4", "train.gradient_checkpointing=true", "method.double_quant=false")),
    ("mixtral", EXPERTS, ("method=qlora4", "train.precision=fp32", "train.seed=1")),
    ("mixtral", EXPERTS, ("method=qlora8",)),
    ("qwen3_moe", EXPERTS | {"head_dim": 16}, ("method=qlora4",)),
    ("deepseek_v3", LATENT, ("method=qlora4",)),
    ("gpt_oss", EXPERTS | {"head_dim": 16}, ("method=qlora4",)),
    ("qwen3_moe", EXPERTS | {"head_dim": 16}, ()),
    ("qwen3_moe", EXPERTS | {"head_dim": 16}, ("method=qlora8", ATTENTION)),
    ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}, ()),
    ("olmoe", EXPERTS, ("train.precision=fp32",)),
    ("gpt_oss", EXPERTS | {"head_dim": 16}, ()),
    ("deepseek_v3", LATENT, ()),
    ("granitemoe", EXPERTS, ()),
    ("jetmoe", LOCAL | {"kv_channels": 16}, ()),
    ("granitemoe", LOCAL, ("method=qlora4",)),
    ("phimoe", LOCAL, ()),
    ("llama4_text", LOCAL | {"head_dim": 16, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}, ()),
    ("granitemoehybrid", HYBRID | LOCAL, ()),
    ("granitemoehybrid", HYBRID | {"num_local_experts": 0, "num_experts_per_tok": 0}, ()),
    ("mamba2", {"num_heads": 8, "state_size": 8, "head_dim": 16, "n_groups": 1}, ()),
    ("olmoe", EXPERTS, ("method=qlora8",)),
    ("deepseek_v2", LATENT | {"topk_method": "greedy"}, ("method=qlora8",)),
    ("deepseek_v3", LATENT, ("method=qlora8",)),
    ("phimoe", EXPERTS, ("method=qlora4",)),
    ("gpt_oss", EXPERTS | {"head_dim": 16}, ("method=qlora8",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sizes", "words"), ASKED, ids=[" ".join((name, *more)) for name, _, more in ASKED]
)
def test_merged_experts_are_base_and_adapter(
    architecture: str, sizes: dict[str, Any], words: tuple[str, ...], train: Callable[..., Any], tmp_path: Path
) -> None:
    asked = tiny_llama.words(tmp_path, tied=False, architecture=architecture, **sizes)
    finished, run = train(*asked, *ALL, "method=lora", "train.max_steps=4", *words)
    expected = exact(finished.model)
    merge(run, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untouched = proof.agreement(expected, exact(base)).typical_difference
    assert proof.agreement(expected, exact(loaded)).typical_difference < 0.2 * untouched
    (step,) = checkpoints.complete(run)
    export(spec(run), run, step, tmp_path / "exported", lambda line: None)
    again = exact(PeftModel.from_pretrained(base, str(tmp_path / "exported")))
    saved = exact(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(run.path / "model"))
    )
    assert all(torch.equal(a, b) for a, b in zip(again, saved, strict=True))
    names = {name.rpartition(".")[2] for name, _ in base.named_parameters()}
    assert names == {name.rpartition(".")[2] for name, _ in loaded.named_parameters()}


@pytest.mark.parametrize("words", ["method.dropout=0.1", "method.use_dora=true", "method.init=pissa"])
def test_what_cannot_be_done_to_experts_is_refused_with_its_remedy(
    words: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    asked = tiny_llama.words(tmp_path, tied=False, architecture="mixtral", **EXPERTS)
    with pytest.raises(RequestError) as refused:
        train(*asked, "method=lora", words)
    (problem,) = refused.value.problems
    assert problem.source == words.partition("=")[0] and (problem.remedy or "").startswith(f"write {problem.source}=")


def test_a_mixture_answers_and_is_saved_as_it_was_published(train: Callable[..., Any], tmp_path: Path) -> None:
    """TRL switches `output_router_logits` on in the configuration, with which nothing can be generated."""
    asked = tiny_llama.words(tmp_path, tied=False, architecture="mixtral", **EXPERTS)
    finished, run = train(*asked, "method=full", "eval.num_prompts=2", "train.max_steps=2")
    assert finished.summary["eval"]["num_prompts"] == 2
    assert AutoModelForCausalLM.from_pretrained(run.path / "model").config.output_router_logits is False


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_resumed_mixture_goes_on_with_its_experts(method: str, train: Callable[..., Any], tmp_path: Path) -> None:
    """Saved under the names it was published with, of which transformers' resume finds no expert, and says nothing."""
    asked = tiny_llama.words(tmp_path, tied=False, architecture="mixtral", **EXPERTS)
    finished, run = train(*asked, f"method={method}", "train.max_steps=4", "train.save_every_steps=2")
    losses = [line["loss"] for line in run.metrics()]
    again = RunDir(tmp_path / "again")
    rewind(run, again)
    resumed, _ = train_here(spec(again), again)
    assert [line["loss"] for line in again.metrics()] == losses
    before, after = finished.model.state_dict(), resumed.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name: p.requires_grad for name, p in finished.model.named_parameters()} == {
        name: p.requires_grad for name, p in resumed.model.named_parameters()
    }
