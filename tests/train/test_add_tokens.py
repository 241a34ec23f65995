"""`data.add_tokens`: the embedding grows, the new rows train and are saved, and the run's model loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from runner.errors import RequestError
from runner.train import adapter_config, model_loading, trainable_weights
from runner.train.merge.adapter import fold
from tests.conftest import spec_of

WORDS = ("data.add_tokens=['<call>','</call>']",)


def loaded(*overrides: str) -> tuple[Any, Any, Any]:
    spec = spec_of(*WORDS, *overrides)
    source = model_loading.source_of(spec.model)
    return spec, model_loading.load_tokenizer(spec, source), model_loading.load_model(spec, source)


def test_new_tokens_are_one_id_and_begin_as_the_mean() -> None:
    _, tokenizer, model = loaded("method=lora")
    ids = tokenizer("<call>x</call>", add_special_tokens=False)["input_ids"]
    assert ids[0] == len(tokenizer) - 2 and ids[-1] == len(tokenizer) - 1
    weight = model.get_input_embeddings().weight
    assert model.added_token_ids == [ids[0], ids[-1]] and len(weight) >= len(tokenizer)
    torch.testing.assert_close(weight[ids[0]].float(), weight[:-2].float().mean(0), atol=1e-2, rtol=0)


def test_freeze_says_that_it_trains_no_embedding() -> None:
    spec, _, model = loaded("method=freeze")
    with pytest.raises(RequestError, match="method=freeze trains none"):
        trainable_weights.mark_trainable(spec, model)


def test_an_adapter_trains_and_saves_them(tmp_path: Path) -> None:
    """One step on the new rows; then the adapter meets a base that was loaded anew, and says the same."""
    spec, tokenizer, model = loaded("method=lora", "train.precision=fp32")
    model = get_peft_model(model, adapter_config.adapter_config(spec, model))
    ids = torch.tensor([tokenizer("<call> hello")["input_ids"]])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any("token_adapter" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded("method=lora", "train.precision=fp32")[2], str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_an_adapter_with_new_tokens_is_merged() -> None:
    """Their rows are fp32 and the embedding they go into is bf16: rounded like all that is merged."""
    spec, tokenizer, model = loaded("method=lora", "train.precision=bf16")
    model = get_peft_model(model.bfloat16(), adapter_config.adapter_config(spec, model))
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.float() + 0.5
    ids = [len(tokenizer) - 2, len(tokenizer) - 1]
    before = model.get_input_embeddings()(torch.tensor(ids)).detach().float()
    merged, rounded = fold(model, torch.bfloat16)
    weight = merged.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16 and any("embed_tokens" in name for name in rounded)
    torch.testing.assert_close(weight[ids].float(), before, atol=0.01, rtol=0)
    assert merged.get_output_embeddings().weight is weight
