"""Merge an adapter into a plain 16-bit folder: added to its base in fp32, and rounded once without bias.

The base is loaded packed exactly as in training, and unpacked: those are the weights that the adapter was trained
against. Then the folder is read back, and must say what base + adapter said (proof.py).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Turn
from runner.errors import Problem, RequestError
from runner.hub.model_card import write_card
from runner.rundir.atomic_folder import whole
from runner.rundir.directory import RunDir
from runner.spec import DeepSpeedSpec, RunSpec
from runner.train import model_loading, quantised_experts, stop_tokens
from runner.train.merge import proof
from runner.train.merge.proof import dequantised, quantised
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

SEED = 0  # the same merge gives the same weights
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
        facts = proof.prove(folder, model_loading.attention(spec), before, prompts, rounded, dtype, as_run)
        size = sum(file.stat().st_size for file in folder.iterdir()) / GIB
    facts = {"folder": str(target), "dtype": str(dtype).removeprefix("torch."), "gib": size, "prompts": what} | facts
    for line in _lines(facts):
        say(line)
    return facts


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
    if packing is not None and not any(map(quantised, base.modules())):
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


# ── folding ────────────────────────────────────────────────────────────────────────────────────


def fold(model: PeftModel, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The merged model, plain and on the CPU, and the names of the weights that were rounded to `dtype`.

    PEFT alone would merge into the packed weight and pack the sum again, with a second quantisation error as large as
    the first; or, in 16 bits, round the update and then the sum, to nearest. So every layer gets a plain base in fp32
    first, and only one layer at a time is that large. ValueError for a weight that is not finite.
    """
    rounded = set()
    generator = torch.Generator().manual_seed(SEED)
    for name, layer in list(model.get_base_model().named_modules()):
        if isinstance(layer, lora.ParamWrapper):  # a parameter that is no layer's weight: all of a mixture's experts
            experts, own = layer.get_base_layer(), layer.parameter_name
            _unpack_experts(experts, own)
            setattr(experts, own, _widened(getattr(experts, own)))
            layer.merge(safe_merge=True)
            _round_parameters(experts, dtype, generator)
            rounded.add(f"{name.replace('.base_layer', '')}.{own}")  # one wrapper in another where several are adapted
        elif isinstance(layer, lora.LoraLayer):
            packed = quantised(layer.get_base_layer())
            layer.base_layer = _unpacked_layer(layer.get_base_layer())
            # On the classes for packed layers PEFT's own `merge` packs again; the update itself is the same.
            kind: Any = lora.Linear if packed else type(layer)
            kind.merge(layer, safe_merge=True)
            _round_parameters(layer.base_layer, dtype, generator)
            rounded.add(f"{name}.weight")
        elif isinstance(layer, TrainableTokensLayer):  # PEFT copies its fp32 rows into a weight of their own width only
            weight = layer.get_base_layer().weight
            weight.data = weight.data.float()  # in place: the output may share it
        elif isinstance(layer, BaseTunerLayer) and hasattr(layer.get_base_layer(), "weight"):
            base: Any = layer.get_base_layer()
            for own, parameter in list(base.named_parameters(recurse=False)):  # (IA)³ scales a bias, too
                setattr(base, own, _widened(parameter))
            layer.merge(safe_merge=True)
            _round_parameters(base, dtype, generator)
            rounded |= {f"{name}.{own}" for own, _ in base.named_parameters(recurse=False)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload()  # nothing is left to merge: takes the wrappers away, keeps saved modules
    for name, module in list(merged.named_modules()):
        if quantised(module):
            plain = _unpacked_layer(module)
            rounded |= {f"{name}.{own}" for own, p in plain.named_parameters() if _loses_precision(p, dtype)}
            _round_parameters(plain, dtype, generator)
            merged.set_submodule(name, plain)
        for own in quantised_experts.parameters(module):
            _unpack_experts(module, own)
            rounded |= {f"{name}.{own}"} if _loses_precision(getattr(module, own), dtype) else set()
            _round_parameters(module, dtype, generator)
    rounded |= {name for name, parameter in merged.named_parameters() if _loses_precision(parameter, dtype)}
    _round_parameters(merged, dtype, generator)
    if (quantizer := getattr(merged, "hf_quantizer", None)) is not None:  # nothing is quantised any more
        quantizer.remove_quantization_config(merged)
    return merged.cpu(), rounded


def _unpacked_layer(module: Any) -> Any:
    """The same layer with an unpacked fp32 weight of its own; a weight shared with another layer no longer is."""
    if quantised(module):
        bias = module.bias is not None
        plain: Any = nn.Linear(module.in_features, module.out_features, bias=bias, device="meta")
        plain.weight = nn.Parameter(dequantised(module).float(), requires_grad=False)
        plain.bias = module.bias
        return plain
    module.weight = _widened(module.weight)
    return module


def _unpack_experts(experts: Any, own: str) -> None:
    """Give a mixture's experts a plain parameter in place of a quantised one."""
    packed = quantised_experts.parameters(experts).get(own)
    if packed is not None:
        setattr(experts, own, nn.Parameter(quantised_experts.unpacked(packed), requires_grad=False))


def _widened(parameter: torch.Tensor) -> nn.Parameter:
    """A copy in fp32."""
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True), requires_grad=False)


def _loses_precision(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if rounding to `dtype` changes the weight."""
    return parameter.is_floating_point() and not torch.equal(parameter, parameter.to(dtype).to(parameter.dtype))


def _round_parameters(module: Any, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Round parameters to `dtype`, on the CPU; buffers such as the rotary frequencies keep their precision.

    A quantised parameter beside them (the other one of a mixture's experts) holds bits, not numbers.
    """
    for parameter in module.parameters():
        plain = parameter.is_floating_point() and not hasattr(parameter, "quant_state")
        if plain and (parameter.dtype != dtype or parameter.device.type != "cpu"):
            parameter.data = round_stochastically(parameter.data.cpu().float(), dtype, generator)


def round_stochastically(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to a neighbour in `dtype`, so that the expectation is the weight itself; exact values stay.

    The weights of a base lie on the 16-bit grid already. Rounded to nearest, an update of less than half a step is
    lost, all of it and in every weight alike: the adapter comes out smaller than it was trained. Rounded up or down at
    random, with the nearer neighbour as much the likelier, it is kept on average, and what is left is noise that
    cancels out. SmolLM2-135M after 3 steps of LoRA, bf16, 281 positions: to nearest the logits are typically 0.49 away
    from base + adapter (whose own effect is 3.8), at random 0.12.
    """
    near = weight.to(dtype)
    rest = weight - near.float()
    towards = torch.where(rest < 0, -torch.inf, torch.inf).to(dtype)
    other = torch.nextafter(near, towards)
    chance = rest / (other.float() - near.float())  # at most 1/2, and 0 where nothing is left to round
    return torch.where(torch.rand(weight.shape, generator=generator) < chance, other, near)
