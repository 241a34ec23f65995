"""All five methods on the real model: the loss falls, and what is saved is what was in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import modules as bnb_modules
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from runner.errors import RequestError
from runner.machine import detect
from runner.train import model_loading
from tests.conftest import spec_of
from tests.support import tiny_llama

# Where the CPU multiplies in bf16; emulated, a step takes a minute and a half.
PRECISION, DTYPE = ("bf16", torch.bfloat16) if detect.detect().cpu_bf16 else ("fp32", torch.float32)
QUESTION = "Fine-tune Mistral with 4-bit QLoRA on three H100s."


@pytest.fixture(scope="module")
def base() -> str:
    """Folder of the unpacked base model."""
    return model_loading.source_of(spec_of().model)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Logits of one question, [1, s, V], without autocast: the weights decide."""
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    model.eval()
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "quantised"),
    [
        ("full", None),
        ("freeze", None),
        ("lora", None),
        (
            "qlora4",
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=DTYPE,
                bnb_4bit_quant_storage=DTYPE,
            ),
        ),
        ("qlora8", BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)),
    ],
)
def test_trains_and_reloads(
    method: str, quantised: Any, base: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # bitsandbytes' inference kernel for 4 bits rounds differently from its training one: take the latter.
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: False)
    finished, run = train(
        f"method={method}",
        f"train.precision={PRECISION}",
        "train.learning_rate=1e-3",
        "train.warmup_ratio=0",
        "train.attention=sdpa",  # what from_pretrained takes below; eager rounds differently
    )
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    needed = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds", "time"}
    assert needed <= lines[0].keys()

    folder = run.path / "model"
    if method in ("full", "freeze"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    else:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE, quantization_config=quantised)
        loaded = PeftModel.from_pretrained(plain, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    difference = (logits(loaded, tokenizer) - logits(finished.model, finished.tokenizer)).abs().max().item()
    assert difference == 0.0
    # and it is not the base model that was saved
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE)
    assert (logits(loaded, tokenizer) - logits(untouched, tokenizer)).abs().max().item() > 0.5

    summary = json.loads((run.path / "summary.json").read_text("utf-8"))
    assert summary["method"] == method and summary["state"] == "done"
    assert summary["train"]["loss_last"] == lines[-1]["loss"]
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert run.state() == "done"
    for name in ("spec.json", "status.json", "environment.json", "loss.png", "answers_before.jsonl"):
        assert (run.path / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decomposing_starts_reload_on_the_untouched_base(init: str, base: str, train: Callable[..., Any]) -> None:
    """PiSSA and OLoRA change the base while they train; the saved adapter must not need that."""
    finished, run = train(f"method.init={init}", "train.precision=fp32", "train.max_steps=2")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(run.path / "model")
    )
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    torch.testing.assert_close(
        logits(loaded, tokenizer), logits(finished.model, finished.tokenizer), atol=2e-3, rtol=1e-3
    )
    assert not (run.path / "initial_adapter").exists()


def test_dora_rslora_layers_and_saved_modules(train: Callable[..., Any]) -> None:
    finished, _ = train(
        "method.use_dora=true", "method.use_rslora=true", "method.layers=[0,29]", "method.rank=4",
        "method.target_modules=[q_proj,v_proj]", "method.modules_to_save=[norm]", "train.max_steps=1",
        "eval.num_prompts=0",
    )  # fmt: skip
    trained = {n for n, p in finished.model.named_parameters() if p.requires_grad}
    layers = {n.split(".layers.")[1].split(".")[0] for n in trained if ".layers." in n and "lora_" in n}
    assert layers == {"0", "29"}
    assert any("lora_magnitude_vector" in n for n in trained)
    assert any(n.endswith("model.norm.modules_to_save.default.weight") for n in trained)


@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_what_trains_beside_an_adapter_is_measured_as_wide_as_it_is_loaded(
    objective: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    """OPT's norms know 16 bits alone: behind an fp32 embedding the run ended in an error after its last step."""
    base = tiny_llama.words(tmp_path, architecture="opt" if objective == "sft" else "qwen3")
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "w5", "chosen": "w6 w7", "rejected": "w8"}\n' * 8)
    more = {
        "sft": ["method.modules_to_save=[embed_tokens]"],
        "reward": ["objective=reward", f"data.path={rows}", "data.eval_fraction=0.5"],
    }[objective]
    finished, run = train(*base, *more, "train.max_steps=2", "eval.num_prompts=1", "eval.max_new_tokens=2")
    kind = AutoModelForCausalLM if objective == "sft" else AutoModelForSequenceClassification
    head = {} if objective == "sft" else {"num_labels": 1}
    model = kind.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, attn_implementation="sdpa", **head)
    loaded = dict(PeftModel.from_pretrained(model, run.path / "model").named_parameters())
    trained = {name: p for name, p in finished.model.named_parameters() if p.requires_grad}
    assert any(".modules_to_save." in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.dtype == loaded[name].dtype and torch.equal(parameter, loaded[name]), name


@pytest.mark.parametrize(
    ("architecture", "left_out", "sizes"),
    [
        ("phimoe", "mlp.router", {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("mamba", "mixer.out_proj", {}),
    ],
)
def test_all_linear_leaves_out_what_cannot_have_an_adapter(
    architecture: str, left_out: str, sizes: dict[str, Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama.words(tmp_path, architecture=architecture, **sizes)
    more = ["method=lora", "method.dropout=0", "train.max_steps=2", "eval.num_prompts=0"]
    finished, _ = train(*base, *more)
    adapted = {name for name, p in finished.model.named_parameters() if p.requires_grad}
    assert adapted and not [name for name in adapted if f".{left_out}." in name]
    with pytest.raises(RequestError, match="cannot have an adapter"):
        train(*base, *more, f"method.target_modules=[{left_out.rpartition('.')[2]}]")
