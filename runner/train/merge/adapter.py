"""Merge an adapter into a plain 16-bit folder, with a proof of equality.

The base is loaded packed exactly as in training, and unpacked: those are the weights that the adapter was trained
against. Then the folder is read back, and must say what base + adapter said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.load import Turn
from runner.errors import Problem, RequestError, RunFailedError
from runner.hub.model_card import write_card
from runner.rundir.atomic_folder import whole
from runner.rundir.directory import RunDir
from runner.spec import DeepSpeedSpec, RunSpec
from runner.train import model_loading, stop_tokens, varlen_attention
from runner.train.merge import proof
from runner.train.merge.fold import fold
from runner.train.model_saving import fix_generation_config
from runner.train.trainers.trainer_settings import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_PROMPTS = 4
MAX_TOKENS = 128  # of a prompt: 4 × 128 positions of 128,256 fp32 logits (Llama 3) are 0.25 GiB
FIXED_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome; between them lie the Alps.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "1, 1, 2, 3, 5, 8, 13, 21, 34: each number is the sum of the two before it.",
)

# What rounding the merged weights to 16 bits may do to the logits depends on the model, so it is measured on this one:
# its weights are rounded once more at random (proof.rounded_again), DRAWS times, and the merge may be further from base
# + adapter than the furthest of them by these factors. Any two roundings are alike, so the ratio is about 1.
# SmolLM2-135M, bf16, 281 held-out positions: 0.75 (lora), 0.81 (qlora4), 0.97 (qlora8), 0.89 (DoRA over 4 bits), 0.87
# (q_proj of one layer). What is wrong: 5.9 (8 bits) and 40 (4 bits) on the unquantised base, 23 by PEFT's own merge,
# 24 without the adapter. The largest difference of all positions is as telling on average, but one position may be
# sensitive: alone, of 14 roundings of one q_proj the furthest was 5.4 times as far as the furthest of four others.
# A mixture sends a token to another expert where rounding makes two of them change places: of 8 draws on a small JetMoe
# typically 0.015 to 0.023, once 0.066. So before a merge is refused it is held against MOST_DRAWS.
DRAWS, MOST_DRAWS, TYPICAL_FACTOR, MAX_FACTOR = 4, 16, 2.0, 10.0
GIB = 1 << 30


def merge(spec: RunSpec, run: RunDir, target: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `target` and prove it equal; the facts of the proof. RunFailedError, and no `target`, if it is not."""
    adapter = run.path / "model"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    prompts, what = held_out(spec, run, tokenizer)
    made, (spec, model) = spec, _load(spec, adapter, say)
    dtype = _sixteen_bits(spec, model)
    with proof.computing_in_fp32(model):
        before = proof.logits(model, prompts)
    with autocast(spec):
        as_run = proof.logits(model, prompts)
    say("Folding the adapter into its base …")
    merged, rounded = fold(model, dtype)
    fix_generation_config(merged)
    del model  # from here on there is one copy, of 16 bits
    stop_tokens.align(merged, tokenizer)
    with whole(target) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(made, run, folder)
        del merged
        say(f"Reading it back: {len(prompts)} {what}, in fp32 arithmetic …")
        facts = prove(folder, model_loading.attention(spec), before, prompts, rounded, dtype, as_run)
        size = sum(file.stat().st_size for file in folder.iterdir()) / GIB
    facts = {"folder": str(target), "dtype": str(dtype).removeprefix("torch."), "gib": size, "prompts": what} | facts
    for line in _lines(facts):
        say(line)
    return facts


def prove(
    folder: Path, attention: str | None, before: list[torch.Tensor], prompts: list[list[int]], rounded: set[str],
    dtype: torch.dtype, as_run: list[torch.Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Compare the folder, read back, with base + adapter (`before`, and `as_run` in the run's own arithmetic).

    RunFailedError beyond what rounding explains: see `TYPICAL_FACTOR`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype="auto")
    if attention is None:
        varlen_attention.use(model)
    with proof.computing_in_fp32(model):
        after = proof.logits(model, prompts)
    found = proof.agreement(before, after)
    # fp32 arithmetic alone, all that is left where nothing had to be rounded
    typical = largest = least = 1e-5 * max(float(one.abs().max()) for one in before)
    holds = False
    for seed in range(MOST_DRAWS):
        draw = _rounded_once_more(model, prompts, after, rounded, dtype, seed)
        typical = max(typical, TYPICAL_FACTOR * draw.typical_difference + least)
        largest = max(largest, MAX_FACTOR * draw.max_difference + least)
        holds = found.typical_difference <= typical and found.max_difference <= largest  # so that a NaN does not pass
        if holds and seed + 1 >= DRAWS:
            break
    if not holds:
        what = (
            f"the merged model is not base + adapter: its logits differ by up to {found.max_difference:.3g}, typically "
            f"by {found.typical_difference:.3g}; rounding explains {largest:.3g} and {typical:.3g} "
            f"(top-1 agreement {found.top1:.1%})"
        )
        remedy = "the run's model/ is as it was: use the adapter on its base; this should not happen: please report it"
        raise RunFailedError(Problem(what, None, remedy))
    own = proof.agreement(as_run, after)
    return asdict(found) | {"max_bound": largest, "typical_bound": typical, "own_arithmetic": asdict(own)}


def _rounded_once_more(
    model: PreTrainedModel,
    prompts: list[list[int]],
    after: list[torch.Tensor],
    names: set[str],
    dtype: torch.dtype,
    seed: int,
) -> proof.Agreement:
    """Difference of the logits after another rounding of the same weights."""
    with proof.computing_in_fp32(model, proof.rounded_again(names, dtype, seed)):
        return proof.agreement(after, proof.logits(model, prompts))


def held_out(spec: RunSpec, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], str]:
    """Token ids of a few prompts to compare on, and their name: the run's held-out ones with their answers."""
    rows = _rows(run.path / "answers_after.jsonl")[:NUM_PROMPTS]
    if not rows:
        return [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in FIXED_TEXTS], "fixed texts"
    system: list[Turn] = [{"role": "system", "content": spec.data.system_prompt}] if spec.data.system_prompt else []
    words = ChatTokenizer.of(tokenizer)
    found = []
    for row in rows:
        turns: list[Turn] = [*system, {"role": "user", "content": row["prompt"]}]
        answer = row["expected"]  # GRPO's questions may have none
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        ids = words.message_ids(words.turns.template.messages(turns), ask=answer is None)
        found.append(ids[:MAX_TOKENS])
    return found, "held-out prompts"


def _rows(file: Path) -> list[dict[str, Any]]:
    """JSON lines, none where there is no such file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def _load(spec: RunSpec, adapter: Path, say: Callable[[str], None]) -> tuple[RunSpec, Any]:
    """Base + adapter as in training, in one process; and the spec as it had to be changed for this machine.

    A packed base goes to the GPU, if the run had one and there is one: its kernels packed it. Everything else happens
    on the CPU, whose memory has to hold the merged model anyway.
    """
    on_gpu = spec.hw.accelerator == "cuda" and torch.cuda.is_available() and spec.method.packed
    attention = "varlen" if spec.train.attention.startswith("flash") else spec.train.attention  # which knows fp32
    spec = spec.model_copy(
        update={
            "hw": spec.hw.model_copy(update={"accelerator": "cuda" if on_gpu else "cpu"}),
            "deepspeed": DeepSpeedSpec(name="none"),
            "train": spec.train.model_copy(update={"attention": attention}),
        }
    )
    source = model_loading.source_of(spec.model, say)
    say("Loading base and adapter …")
    base = model_loading.load_model(spec, source)
    packing = getattr(base.config, "quantization_config", None)
    if packing is not None and not any(map(proof.quantised, base.modules())):
        kind = getattr(packing, "quant_method", "another method")
        raise RequestError(Problem(f"the base is quantised by {kind}: only bitsandbytes' packing can be undone here"))
    return spec, PeftModel.from_pretrained(base, str(adapter))


def _sixteen_bits(spec: RunSpec, model: PreTrainedModel) -> torch.dtype:
    """The precision to write: the training's; after fp32 training the one that the base was published in, or bf16."""
    if spec.train.precision != "fp32":
        return model_loading.DTYPES[spec.train.precision]
    published = AutoConfig.from_pretrained(model.config._name_or_path, revision=spec.model.revision).dtype
    return published if published in (torch.bfloat16, torch.float16) else torch.bfloat16


def _lines(facts: dict[str, Any]) -> list[str]:
    own = facts["own_arithmetic"]
    return [
        f"Merged  {facts['folder']} ({facts['gib']:.2f} GiB, {facts['dtype']})",
        f"Proof   against base + adapter, {facts['positions']:,} positions of {facts['prompts']}: "
        f"max |difference| of the logits {facts['max_difference']:.3g} (bound {facts['max_bound']:.3g}), "
        f"typically {facts['typical_difference']:.3g} (bound {facts['typical_bound']:.3g}), "
        f"top-1 agreement {facts['top1']:.1%}",
        f"        against the same in the run's own arithmetic: max |difference| {own['max_difference']:.3g}, "
        f"typically {own['typical_difference']:.3g}, top-1 agreement {own['top1']:.1%}",
    ]
