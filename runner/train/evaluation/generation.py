"""Generated answers to held-out prompts, compared exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from transformers import GenerationConfig

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Tool, Turn
from runner.data.loss_mask import IGNORED
from runner.train import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """Generated text for one prompt, up to the token that stopped it."""

    text: str
    """Without special tokens."""
    whole: str
    """With them: tool calls and thoughts may be written with some."""
    stopped: bool
    """It ended by itself, within the limit."""


class AnswerLine(TypedDict):
    """A line of `answers_before.jsonl` and `answers_after.jsonl`."""

    prompt: str
    expected: str | None
    answer: str
    stopped: bool
    exact: bool


@contextmanager
def greedy_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Context in which only the stop tokens of the model's generation config have an effect.

    Published ones sample, return dictionaries or several answers, penalise repetition, stop at strings or ask for code
    of the Hub. `generate` takes from there whatever its caller leaves open.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper reads its base's
    published = owner.generation_config
    owner.generation_config = GenerationConfig(
        eos_token_id=stop_tokens.stop_ids(published, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    try:
        yield
    finally:
        owner.generation_config = published


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Turn]],
    *,
    tools: Sequence[Sequence[Tool]] | None = None,
    max_new_tokens: int,
    batch_size: int,
    autocast: AbstractContextManager[Any],
    on_batch: Callable[[int], None] = lambda done: None,
    sharded: bool = False,
) -> list[Answer]:
    """One greedy answer per conversation, in order; longest prompts first, padded on the left. `tools` are schemas of
    what may be called in each.

    `sharded`: ZeRO-3 gathers each layer from all processes, so all must ask for as many answers, and go on together
    until the last is done.
    """
    words = ChatTokenizer.of(tokenizer)
    given = tools or [()] * len(conversations)
    prompts = words.token_ids([words.prompt_text(*asked) for asked in zip(conversations, given, strict=True)])
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Answer] = {}
    stops = stop_tokens.stop_ids(getattr(model, "generation_config", None), tokenizer)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = {"input_ids": [prompts[i] for i in chosen]}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
        # What ZeRO-3 gathers in inference mode could not be trained with afterwards.
        no_gradients = torch.no_grad() if sharded else torch.inference_mode()
        with no_gradients, autocast, greedy_generation_config(model, tokenizer):
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, synced_gpus=sharded
            )
        new = output[:, batch["input_ids"].shape[1] :]
        for index, ids in zip(chosen, new.tolist(), strict=True):
            answers[index] = _answer(ids, stops, tokenizer)
        on_batch(min(start + batch_size, len(order)))
    model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def _answer(ids: Sequence[int], stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    """Token ids as an answer; `stops` end one."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    text, whole = (tokenizer.decode(ids[:end], skip_special_tokens=skip).strip() for skip in (True, False))
    return Answer(text, whole, end is not None)


def learned_answer(
    words: ChatTokenizer, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], example: Example
) -> Answer:
    """The answer that a model which has learned the example generates."""
    turns = Example(example.prompt, example.completion[:1], dialogue=True, tools=example.tools)
    labels = words.encode(turns, "last").labels
    return _answer([label for label in labels if label != IGNORED], stops, tokenizer)


def compare_answers(
    examples: Sequence[Example], answers: Sequence[Answer], learned: Callable[[Example], Answer]
) -> list[AnswerLine]:
    """Compare answers with the expected ones, prompt by prompt.

    Content is compared as text, calls and thoughts as the template writes them (`learned`). An answer that did not
    stop is wrong, whatever it says: a user would not see its end.
    """
    rows: list[AnswerLine] = []
    for example, answer in zip(examples, answers, strict=True):
        right = example.completion[0] if example.completion else None
        said, expected = answer.text, right["content"].strip() if right else None
        equal = said == expected
        if right and ("tool_calls" in right or "reasoning_content" in right):
            said, expected = answer.whole, learned(example).whole
            equal = said == expected
        elif right and not equal:  # Qwen3 begins each answer with empty thoughts
            equal = answer.whole == learned(example).whole
        line: AnswerLine = {
            "prompt": example.prompt[-1]["content"],
            "expected": expected,
            "answer": said,
            "stopped": answer.stopped,
            "exact": answer.stopped and equal,
        }
        rows.append(line)
    return rows
