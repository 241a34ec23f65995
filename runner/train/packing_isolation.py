"""Proves on the loaded model that documents packed into one sequence do not attend to each other.

Most architectures of transformers make a mask out of the positions that a packed batch comes with; some never look at
them (OPT, BLOOM, MPT), some need a CUDA kernel for it (Mamba), some raise. There is no list to trust: models are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.train.memory_stats import out_of_memory
from runner.train.trainers.trainer_settings import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runner.train.trainers.recording_trainer import RecordingTrainerMixin

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

LENGTH = 16  # tokens of a document
DRAWS = 3
"""Rounding can send a token to another expert of a mixture, and that looks like a leak: but not every time."""
NOISE, LEAST = 4.0, 1e-3
"""A change of one document may move another's logits by so many times what a change *behind* it does (nothing, but for
the kernels' rounding), and by this share of what it does where both are one text. Over 60 small random models, fp32
and bf16: exactly 0 where documents are independent; 1 with OPT, 0.1 with RecurrentGemma, 0.01 with Jamba."""
PLACED = 0.1
"""Share of the way from alone to one text that a document may lie off: 0 to 1e-6 measured, 0.6 with OPT's positions."""


def check_isolation(spec: RunSpec, trainer: RecordingTrainerMixin, tokenizer: PreTrainedTokenizerBase) -> None:
    """RequestError where packing would train on documents that see one another. Every process has to call it."""
    if not spec.train.packing:
        return
    model = trainer.model
    collator = replace(trainer.data_collator.collator, pad_to_multiple_of=None)  # on a CPU all pad to max_length
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices), torch.no_grad(), autocast(spec):
        what = find_leak(model, collator, tokenizer.all_special_ids)
    model.train(training)
    if trainer.ranks.any(what is not None):
        name, kernel = model.config.architectures or [type(model).__name__], model.config._attn_implementation
        which = f"{name[0]} with attention {kernel}"
        what = f"{which} cannot be trained on packed documents: {what or 'on another process'}"
        raise RequestError(Problem(what, "train.packing", "write train.packing=false"))


def find_leak(model: PreTrainedModel, collate: Collate, special: list[int]) -> str | None:
    """Description of how packed documents influence one another; None where each is as if alone."""
    known = [i for i in range(min(1000, model.config.get_text_config().vocab_size)) if i not in special]
    found = None
    for draw in range(DRAWS):
        first, other, second = (_document(known, 3 * draw + i) for i in range(3))
        alone = _logits(model, {"input_ids": torch.tensor([second])})  # what raises here raises without packing, too
        try:
            found = _difference(lambda *given: _logits(model, _batch(collate, given)), first, other, second, alone)
        except Exception as error:
            if out_of_memory(error):
                raise
            return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        if found is None:
            return None
    return found


def _difference(
    packed: Callable[..., torch.Tensor], first: list[int], other: list[int], second: list[int], alone: torch.Tensor
) -> str | None:
    """Describe how the second document's logits depend on the first one, or on there being one; None if they do not."""
    behind, after = slice(-LENGTH, None), packed(first, second)
    joined = packed(first + second)
    moved = _distance(after[behind], packed(other, second)[behind])
    most = _distance(joined[behind], packed(other + second)[behind])
    noise = _distance(packed(second, first)[:LENGTH], packed(second, other)[:LENGTH])
    if moved > NOISE * noise + LEAST * most:
        return f"a change of one moves the logits of the next by {moved:.2g} (as one text: {most:.2g})"
    apart, most = _distance(after[behind], alone), _distance(joined[behind], alone)
    if apart > PLACED * most:
        return f"one behind another has other logits than alone, by {apart:.2g} (as one text: {most:.2g})"
    return None


def _document(known: list[int], number: int) -> list[int]:
    """Token ids that differ from those of another number at every place."""
    return [known[(7 * place + number) % len(known)] for place in range(LENGTH)]


def _batch(collate: Collate, documents: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """A training batch of one sequence."""
    ids = [token for document in documents for token in document]
    batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in documents]}])
    return {name: value for name, value in batch.items() if name != "labels"}


def _logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Those of a batch of one sequence, [s, V]."""
    sent = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    logits: torch.Tensor = model(**sent, use_cache=False).logits
    return logits[0].float()


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of logits, [s, V] both."""
    return float((ours - theirs).abs().max())
