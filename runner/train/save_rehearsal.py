"""Rehearses the final save before the first step: everything but the bytes of the weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoTokenizer

from runner.errors import CannotRunError, Problem, RequestError, RunnerError
from runner.hub.model_card import write_card
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import peft_methods
from runner.train.distributed import Ranks
from runner.train.model_loading import DTYPES

ISSUE = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""A line of transformers' message about a generation config, with the name of a value."""
GIB = 1 << 30


def fix_generation_config(model: Any) -> str | None:
    """Take out of the generation config what has no effect; a line for people, None where there is nothing to mend.

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


def _no_ids(config: Any) -> dict[str, Any]:
    """Take away an `eos_token_id` that holds something else than ids, a token's text or null: nothing would stop."""
    value = config.eos_token_id
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    kept = [one for one in ids if isinstance(one, int)]
    if len(kept) == len(ids):
        return {}
    config.eos_token_id = kept or None
    return {"eos_token_id": value}


def rehearse(spec: RunSpec, run: RunDir, trainer: Any, tokenizer: Any, ranks: Ranks) -> None:
    """Write a checkpoint and a model without their weights, and remove them. Every process has to call it.

    RequestError for what cannot be saved, CannotRunError where there is no room for it.
    """
    error: RunnerError | None = None
    if ranks.main:
        folder = run.path / ".rehearsal.tmp"
        try:
            _room(spec, run, trainer.model)
            with _weightless():
                _write(spec, run, folder, trainer, tokenizer)
        except RunnerError as refused:
            error = refused
        except OSError as refused:
            error = CannotRunError(
                Problem(f"{run.path} cannot be written to: {refused.strerror or refused}", "run.output_dir")
            )
        except Exception as refused:
            first = next(iter(str(refused).strip().splitlines()), "")
            what = f"the trained model could not be saved: {type(refused).__name__}: {first}"
            remedy = "correct config.json, generation_config.json or the tokenizer's files in a copy of model.id"
            error = RequestError(Problem(what, "model.id", remedy))
            error.__cause__ = refused
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    error = ranks.from_main(error)
    if error is not None:
        raise error


def _write(spec: RunSpec, run: RunDir, folder: Path, trainer: Any, tokenizer: Any) -> None:
    """As `saving` a checkpoint does, and the end of the run."""
    sharded = trainer.is_deepspeed_enabled and spec.deepspeed.name.startswith("zero3")  # no process has whole weights
    trainer._save(str(folder), state_dict={} if sharded else None)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    again = AutoTokenizer.from_pretrained(folder)
    if (len(again), again.chat_template) != (len(tokenizer), tokenizer.chat_template):
        raise ValueError("the tokenizer is another one when it is read back")
    write_card(spec, run, folder)


def _room(spec: RunSpec, run: RunDir, model: Any) -> None:
    """CannotRunError where the disk has no room for the model alone; checkpoints are the plan's."""
    dtype = torch.float32 if peft_methods.adapter_of(spec) else DTYPES[spec.train.precision]
    trainable, total, _ = peft_methods.describe_trainable(model)
    needed = (trainable if peft_methods.adapter_of(spec) else total) * dtype.itemsize
    free = shutil.disk_usage(run.path).free
    if needed > free:
        what = f"the trained model takes {needed / GIB:.1f} GiB, and {run.path} has {free / GIB:.1f} GiB free"
        raise CannotRunError(Problem(what, "run.output_dir", "make room, or name a folder on a larger disk"))


@contextmanager
def _weightless() -> Iterator[None]:
    """Context in which transformers and PEFT write everything but weights."""
    with (
        patch("transformers.modeling_utils.safe_save_file", _unwritten),
        patch("peft.peft_model.safe_save_file", _unwritten),
    ):
        yield


def _unwritten(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
    """In place of `safetensors.torch.save_file`."""
