"""Export a checkpoint as what the final save would have written.

A plain checkpoint holds a model or an adapter already, in the precision that it trains in. DeepSpeed's holds shards of
fp32 weights for each process (`global_step<N>/`), and nothing else: names and files come from the run's base then.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.trainer_utils import align_special_tokens

from runner.errors import Problem, RequestError, RunFailedError
from runner.hub.model_card import write_card
from runner.rundir import checkpoints
from runner.rundir.atomic_folder import whole
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import adapter_config, model_loading, model_saving, stop_tokens, trainable_weights
from runner.train.model_saving import fix_generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

State = dict[str, torch.Tensor]
SHOWN = 3  # names of an error


class Exported(TypedDict):
    """The JSON of `export`."""

    folder: str
    kind: Literal["adapter", "model"]
    step: int
    sharded: bool
    """The checkpoint was DeepSpeed's."""


class GatheredTensor(Protocol):
    """A weight in a DeepSpeed checkpoint, put together from its shards when asked."""

    def contiguous(self) -> torch.Tensor: ...


def export(spec: RunSpec, run: RunDir, step: int, target: Path, say: Callable[[str], None]) -> Exported:
    """Write `target` from the checkpoint after `step`. RunFailedError where its weights are not the run's."""
    checkpoint = checkpoints.folder(run, step)
    sharded = (checkpoint / "latest").is_file()  # DeepSpeed's file: the name of the folder with the shards
    kept = (checkpoint / "tokenizer_config.json").is_file()
    source = model_loading.source_of(spec.model, say) if sharded or not kept else ""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if kept else model_loading.load_tokenizer(spec, source)
    say(f"Reading checkpoint {step} …")
    with whole(target) as folder:
        if spec.method.adapts:
            config, state = _gathered_adapter(spec, source, checkpoint) if sharded else _plain_adapter(spec, checkpoint)
            if model_saving.starts_from_base(spec):
                state = _over_whole_base(config, state, run.path / "initial_adapter")
            save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.inference_mode = True
            config.save_pretrained(str(folder))
            stop_tokens.save(folder, tokenizer)
        else:
            model = _gathered_model(spec, source, checkpoint, tokenizer) if sharded else _plain_model(spec, checkpoint)
            model.config.use_cache = True  # training switched it off
            fix_generation_config(model)
            stop_tokens.align(model, tokenizer)
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(spec, run, folder, step)
    kind: Literal["adapter", "model"] = "adapter" if spec.method.adapts else "model"
    say(f"Written {target} ({kind}, step {step})")
    return {"folder": str(target), "kind": kind, "step": step, "sharded": sharded}


def _plain_model(spec: RunSpec, checkpoint: Path) -> PreTrainedModel:
    """All weights of a plain checkpoint; those that train are in fp32 there, and 16 bits in what is saved."""
    return model_loading.auto_class(spec).from_pretrained(checkpoint, dtype=model_loading.DTYPES[spec.train.precision])


def _plain_adapter(spec: RunSpec, checkpoint: Path) -> tuple[PeftConfig, State]:
    """The adapter of a plain checkpoint, as wide as peft loads it."""
    state = load_file(checkpoint / "adapter_model.safetensors")
    return PeftConfig.from_pretrained(str(checkpoint)), {
        name: value.to(trainable_weights.saved_dtype(spec, name)) for name, value in state.items()
    }


def _shards(checkpoint: Path, *, trained_only: bool = False) -> dict[str, GatheredTensor]:
    """The weights of a DeepSpeed checkpoint by their names, put together when asked: `.contiguous()`."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()):  # it tells what it does, line by line
        found: dict[str, GatheredTensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), exclude_frozen_parameters=trained_only, lazy_mode=True
        )
    return found


def _gathered_adapter(spec: RunSpec, source: str, checkpoint: Path) -> tuple[PeftConfig, State]:
    """The adapter of a DeepSpeed checkpoint, in fp32.

    Under DeepSpeed an adapter computes in the run's precision, and the final save takes it from there: so it is
    rounded to that, though the shards hold more digits.
    """
    model = _model_without_weights(source, spec, where="meta")  # names and shapes are all that is needed: no memory
    config = adapter_config.adapter_config(spec, model)
    assert config is not None
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # others would decompose the weights of the base
    wrapped = get_peft_model(model, config)
    shards = _shards(checkpoint, trained_only=True)
    wanted = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    _check_same_names(wanted, shards, checkpoint)
    dtype = model_loading.DTYPES[spec.train.precision]
    state = {name: shards[name].contiguous().to(dtype).float() for name in wanted}
    return config, dict(get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False))


def _gathered_model(
    spec: RunSpec, source: str, checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model of a DeepSpeed checkpoint in the run's precision; frozen weights that it leaves out are the base's."""
    shards = _shards(checkpoint)
    model = _model_without_weights(source, spec, where="cpu")
    if any(name not in shards for name, _ in model.named_parameters()):
        dtype = model_loading.DTYPES[spec.train.precision]
        model = model_loading.auto_class(spec).from_pretrained(
            source, revision=spec.model.revision, dtype=dtype, **model_loading.head_options(spec)
        )
        trainable_weights.mark_trainable(spec, model)
        _check_same_names([name for name, p in model.named_parameters() if p.requires_grad], shards, checkpoint)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    own = dict(model.state_dict(keep_vars=True))
    _check_same_names(list(shards), own, checkpoint)
    for name in list(shards):
        own[name].data.copy_(shards.pop(name).contiguous())  # one weight after the other: no second copy of them all
    align_special_tokens(model, tokenizer)  # as the trainer did
    return model


def _model_without_weights(source: str, spec: RunSpec, where: str) -> PreTrainedModel:
    """The run's model without its weights, in the run's precision."""
    config = AutoConfig.from_pretrained(source, revision=spec.model.revision, **model_loading.head_options(spec))
    with torch.device("meta"):
        model = model_loading.auto_class(spec).from_config(config, dtype=model_loading.DTYPES[spec.train.precision])
    if where != "meta":
        model.to_empty(device=where)
        model.tie_weights()
    with suppress(OSError):  # without one, what transformers made of the config stays
        model.generation_config = GenerationConfig.from_pretrained(source, revision=spec.model.revision)
    return model


def _check_same_names(wanted: list[str], there: Collection[str], checkpoint: Path) -> None:
    """RunFailedError where weights are missing: the checkpoint is of another model, or of another method."""
    missing = [name for name in wanted if name not in there]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        what = f"{checkpoint} does not fit the run's model: {', '.join(missing[:SHOWN])}{more} found on one side only"
        raise RunFailedError(Problem(what))


def _over_whole_base(config: PeftConfig, state: State, start: Path) -> State:
    """The adapter over the untouched base; RequestError where its start is gone: the final save of a run removes it."""
    if not start.is_dir():
        remedy = "the finished run's model/ is the adapter after the last step"
        raise RequestError(Problem(f"{start} is gone, and without it the checkpoint cannot be converted", None, remedy))
    return model_saving.adapter_over_whole_base(config, state, start)
