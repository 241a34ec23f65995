"""`train.compile=true` trains as without it, under the same names, with few compilations; what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from runner.errors import RequestError
from runner.machine import kernels
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.train import varlen_attention
from runner.train.compiled_layers import compile_layers
from tests.conftest import spec_of, train_here
from tests.support import tiny_llama

DOCUMENTS = ([10, 22], [5, 27], [3, 3, 26], [32])
OTHERS = ((False, False), (True, False), (False, True))


def small(adapter: bool, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", num_hidden_layers=12, vocab_size=64, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    assert varlen_attention.use(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter:
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def step(model: Any, lengths: list[int]) -> tuple[float, torch.Tensor]:
    ids = torch.arange(sum(lengths))[None] * 7 % 64
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("adapter", "checkpointing"), [(True, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_documents_of_other_lengths_are_not_compiled_again(adapter: bool, checkpointing: bool) -> None:
    """Twelve layers: the code of a layer serves all, or torch's limit of eight would be reached."""
    torch._dynamo.reset()
    model = small(adapter, checkpointing)
    plain = [step(model, lengths) for lengths in DOCUMENTS]
    names = list(model.state_dict())
    seen: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    assert compile_layers(model, fixed_shapes=True, backend=count) == 12
    number = []
    for lengths, (loss, gradients) in zip(DOCUMENTS, plain, strict=True):
        found, theirs = step(model, lengths)
        number.append(len(seen))
        assert found == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(theirs, gradients, rtol=1e-4, atol=1e-6)
    assert 0 < number[0] == number[-1] <= 8, number
    assert list(model.state_dict()) == names  # no `_orig_mod`

    model.eval()
    with torch.no_grad():  # another shape, and nothing is compiled for it
        model(input_ids=torch.arange(5)[None])
        model.generate(input_ids=torch.arange(1, 4)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(seen) == number[-1]


def losses(run: RunDir) -> list[float]:
    return [line["loss"] for line in run.metrics()]


@pytest.mark.slow
@pytest.mark.parametrize("more", [("train.packing=true",), ("train.gradient_checkpointing=true",)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_has_the_losses_of_one_without_resumes_and_is_loaded(
    method: str, more: tuple[str, ...], train: Callable[..., Any], tmp_path: Path
) -> None:
    words = [*tiny_llama.words(tmp_path), f"method={method}", "train.precision=fp32", "train.max_steps=5"]
    words += ["train.save_every_steps=3", "eval.num_prompts=2", "eval.every_steps=2", *more]
    finished, run = train(*words, "train.compile=true")
    _, other = train(*words)
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)
    assert json.loads((run.path / "environment.json").read_text("utf-8"))["compiled_layers"] is True

    again = RunDir.create(run.spec)  # the same run, from its third step
    (again.path / "checkpoints").mkdir(exist_ok=True)
    checkpoints.folder(run, 3).rename(checkpoints.folder(again, 3))
    resumed, _ = train_here(run.spec, again)
    ours, theirs = finished.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    saved = str(run.path / "model")
    source = tmp_path / "base" if method == "lora" else saved
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, saved) if method == "lora" else base
    words_in = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=words_in).logits.float() for model in (finished.model, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model=mistral7b", "method=qlora4"), "are not compiled"),
        (("model=mistral7b", "hw=h100x8", "deepspeed=zero3"), "in the middle of a layer"),
        (("model=mixtral_8x7b", "method=lora"), "where each token is routed"),
        (("model=mistral7b", "train.liger=true"), "write train.liger=false"),
    ],
)
def test_what_is_not_compiled_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        spec_of("hw=h100", *words, "train.compile=true")
    assert said in f"{refused.value} {refused.value.problems}"


def test_a_cpu_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("hw=cpu", "train.compile=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    what, remedy = kernels.no_compiler_of_layers(spec) or ("", "")
    assert "no-such-compiler" in what and "train.compile=false" in remedy
    assert kernels.no_compiler_of_layers(spec_of("hw=cpu")) is None
