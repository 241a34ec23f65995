"""The final save: `model/` as transformers or PEFT load it, and its rehearsal before the first step."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from runner.errors import CannotRunError, Problem, RequestError, RunnerError
from runner.hub.model_card import write_card
from runner.rundir.directory import RunDir
from runner.spec import Lora, RunSpec
from runner.train import stop_tokens, trainable_weights
from runner.train.distributed import Ranks
from runner.train.model_loading import DTYPES

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from runner.train.trainers.recording_trainer import RecordingTrainerMixin

ISSUE = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""A line of transformers' message about a generation config, with the name of a value."""
GIB = 1 << 30


def fix_generation_config(model: PreTrainedModel) -> str | None:
    """Remove values without effect from the generation config; a line for people, None where there were none.

    Published ones hold `do_sample: false, temperature: 0.6`, or beams of one. transformers loads them and refuses to
    save them as soon as anything else has changed, which training does. What the model answers stays the same.
    """
    config = getattr(model, "generation_config", None)
    taken = {} if config is None else _no_ids(config)
    while config is not None:
        try:
            config.validate(strict=True)
            break
        except ValueError as error:
            names = [name for name in ISSUE.findall(str(error)) if getattr(config, name, None) is not None]
            if not names:
                break  # nothing to take out: the rehearsal says what is wrong
            taken |= {name: getattr(config, name) for name in names}
            for name in names:
                setattr(config, name, None)
    if not taken:
        return None
    shown = ", ".join(f"{name}: {value}" for name, value in taken.items())
    return f"Left out of generation_config.json, as without effect there: {shown}"


def _no_ids(config: GenerationConfig) -> dict[str, Any]:
    """Remove whatever is no id from `eos_token_id` (a token's text, null), with which nothing would stop."""
    value = config.eos_token_id
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    kept = [one for one in ids if isinstance(one, int)]
    if len(kept) == len(ids):
        return {}
    config.eos_token_id = kept or None
    return {"eos_token_id": value}


def save_model(
    spec: RunSpec, run: RunDir, trainer: RecordingTrainerMixin, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> None:
    """Write `model/` so that plain transformers (or peft, for an adapter) loads it; whole or not at all."""
    temporary, final = run.path / ".model.tmp", run.path / "model"
    state = None
    if trainer.is_deepspeed_enabled and spec.deepspeed.name.startswith("zero3"):
        trainer.deepspeed.empty_partition_cache()  # what was fetched ahead of its use: it cannot be gathered again
        state = gather_weights(spec, trainer.model, ranks.main)
    if ranks.main:
        shutil.rmtree(temporary, ignore_errors=True)
        trainer.model.config.use_cache = True  # training switched it off
        save_weights(spec, trainer.model, temporary, run, state)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's, of a path and "More Information Needed"
        if spec.method.adapts:
            stop_tokens.save(temporary, tokenizer)
        shutil.rmtree(final, ignore_errors=True)  # of a run that was extended
        temporary.rename(final)
    ranks.barrier()


def starts_from_base(spec: RunSpec) -> bool:
    """True for PiSSA and OLoRA, which decompose the base weight into adapter and rest."""
    return isinstance(spec.method, Lora) and spec.method.init in ("pissa", "olora")


def keep_initial_adapter(spec: RunSpec, model: PreTrainedModel, run: RunDir) -> None:
    """Save the initial adapter of PiSSA and OLoRA, which took it out of the base: the final save needs it."""
    if starts_from_base(spec):
        model.save_pretrained(run.path / "initial_adapter")


def save_weights(
    spec: RunSpec, model: PreTrainedModel, folder: Path, run: RunDir, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the weights that `from_pretrained` needs: all of them, or the adapter over the untouched base.

    `state` are the weights where the model itself holds only a part of them (ZeRO-3).
    """
    if not starts_from_base(spec):
        model.save_pretrained(folder, state_dict=state)
        return
    start, config = run.path / "initial_adapter", copy.deepcopy(model.peft_config["default"])
    own = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True)
    weights = adapter_over_whole_base(config, own, start)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))
    shutil.rmtree(start)


def adapter_over_whole_base(config: PeftConfig, state: dict[str, torch.Tensor], start: Path) -> dict[str, torch.Tensor]:
    """An adapter over the untouched base, from one that started as a part of it (PiSSA, OLoRA); `config` becomes its.

    The base lost B₀·A₀ when training began, so what was learned is B·A − B₀·A₀ = [B −B₀]·[A; A₀]: twice the rank, at
    the same scale alpha / rank. `start` holds A₀ and B₀.
    """
    first = load_file(start / "adapter_model.safetensors")
    found = {}
    for name, value in state.items():
        value = value.detach().to("cpu", torch.float32)
        if "lora_A" in name:
            value = torch.cat([value, first[name].float()], dim=0)
        elif "lora_B" in name:
            value = torch.cat([value, -first[name].float()], dim=1)
        found[name] = value.contiguous()
    config.r *= 2
    config.lora_alpha *= 2
    config.init_lora_weights = True
    return found


def gather_weights(spec: RunSpec, model: PreTrainedModel, main: bool) -> dict[str, torch.Tensor]:
    """Gather the weights to save of a model that ZeRO-3 sharded, one by one; on the main process only.

    Every process must call it. An adapter's own weights, or all of them, in the precision they are trained in.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    adapter = spec.method.adapts
    dtype = torch.float32 if adapter else DTYPES[spec.train.precision]
    found = {}
    for name, parameter in model.named_parameters():
        if adapter and not parameter.requires_grad:
            continue
        with GatheredParameters([parameter]):
            if main:
                found[name] = parameter.data.to("cpu", dtype, copy=True)
    if main and not adapter:
        buffers = {name for name, _ in model.named_buffers()}  # those that are saved are in `state_dict`, too
        found |= {name: value for name, value in model.state_dict().items() if name in buffers}
    return found


def check_room(spec: RunSpec, run: RunDir, trainer: RecordingTrainerMixin, ranks: Ranks) -> None:
    """Raise CannotRunError where the disk has no room for the model alone. Every process has to call it."""
    _on_main(run, ranks, partial(_check_room, spec, run, trainer.model))


def rehearse_save(
    spec: RunSpec, run: RunDir, trainer: RecordingTrainerMixin, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> None:
    """Write a checkpoint and a model without their weights, and remove them. Every process has to call it.

    RequestError for what cannot be saved, CannotRunError where nothing can be written.
    """
    folder = run.path / ".rehearsal.tmp"

    def write() -> None:
        try:
            with _weightless():
                _write(spec, run, folder, trainer, tokenizer)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    _on_main(run, ranks, write)


def _on_main(run: RunDir, ranks: Ranks, action: Callable[[], None]) -> None:
    """Call `action` in the main process; every process raises what went wrong there, in words for people."""
    error: RunnerError | None = None
    if ranks.main:
        try:
            action()
        except RunnerError as refused:
            error = refused
        except OSError as refused:
            what = f"{run.path} cannot be written to: {refused.strerror or refused}"
            error = CannotRunError(Problem(what, "run.output_dir"))
        except Exception as refused:
            first = next(iter(str(refused).strip().splitlines()), "")
            what = f"the trained model could not be saved: {type(refused).__name__}: {first}"
            remedy = "correct config.json, generation_config.json or the tokenizer's files in a copy of model.id"
            error = RequestError(Problem(what, "model.id", remedy))
            error.__cause__ = refused
    error = ranks.broadcast(error)
    if error is not None:
        raise error


def _write(
    spec: RunSpec, run: RunDir, folder: Path, trainer: RecordingTrainerMixin, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write as a checkpoint and the final save do, and read the tokenizer back."""
    sharded = trainer.is_deepspeed_enabled and spec.deepspeed.name.startswith("zero3")  # no process has whole weights
    trainer._save(str(folder), state_dict={} if sharded else None)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    again = AutoTokenizer.from_pretrained(folder)
    if (len(again), again.chat_template) != (len(tokenizer), tokenizer.chat_template):
        raise ValueError("the tokenizer is another one when it is read back")
    write_card(spec, run, folder)


def _check_room(spec: RunSpec, run: RunDir, model: PreTrainedModel) -> None:
    """CannotRunError where the disk has no room for the model alone; checkpoints are the plan's."""
    trainable, total, _ = trainable_weights.describe_trainable(model)
    needed = 4 * trainable if spec.method.adapts else total * DTYPES[spec.train.precision].itemsize
    free = shutil.disk_usage(run.path).free
    if needed > free:
        what = f"the trained model takes {needed / GIB:.1f} GiB, and {run.path} has {free / GIB:.1f} GiB free"
        raise CannotRunError(Problem(what, "run.output_dir", "make room, or name a folder on a larger disk"))


@contextmanager
def _weightless() -> Iterator[None]:
    """Context in which transformers and PEFT write everything but weights."""
    nothing = partial(patch, new=_write_nothing)
    with nothing("transformers.modeling_utils.safe_save_file"), nothing("peft.peft_model.safe_save_file"):
        yield


def _write_nothing(*_: object, **__: object) -> None:
    """Take the place of `safetensors.torch.save_file`; a Mock would keep the weights that it is called with alive."""
