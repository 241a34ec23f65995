"""Held-out prompts answered by the model and compared exactly, and the shared way to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from runner.data.formats import Example, Turn
from runner.train.dataset import chat_ids


def generate(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Turn]],
    *,
    max_new_tokens: int,
    batch_size: int,
    autocast: AbstractContextManager[Any],
    on_batch: Callable[[int], None] = lambda done: None,
    sharded: bool = False,
) -> list[str]:
    """One greedy answer per conversation, in order; longest prompts first, padded on the left.

    `sharded`: ZeRO-3 gathers each layer from all processes, so all must ask for as many answers, and go on together
    until the last is done.
    """
    prompts = [chat_ids(tokenizer, turns, ask=True) for turns in conversations]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        # What ZeRO-3 gathers in inference mode could not be trained with afterwards.
        with torch.no_grad() if sharded else torch.inference_mode(), autocast:
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                synced_gpus=sharded,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        for index, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[index] = text.strip()
        on_batch(min(start + batch_size, len(order)))
    model.train(was_training)
    return answers


def compare(examples: list[Example], answers: list[str]) -> list[dict[str, Any]]:
    """Per prompt: the question, what was expected, what came, and whether the two are equal."""
    return [
        {
            "prompt": example.prompt[-1]["content"],
            "expected": expected,
            "answer": answer,
            "exact": answer == expected,
        }
        for example, answer in zip(examples, answers, strict=True)
        for expected in [example.completion[0]["content"].strip() if example.completion else None]
    ]
