"""Preferences, marked answers and questions → token ids, as TRL's own trainers would make them.

The trainers are given these columns and leave them as they are (preference.py), so what is cut and dropped is known and
said, and one process's mistake is not found by every process anew. That the ids are TRL's is tested against TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from runner.data.examples import Judged, Preference, Question, Turn
from runner.errors import Problem, RequestError
from runner.spec import Grpo, Reward, RunSpec
from runner.train.dataset import Tokenised, chat_ids


def tokenise(rows: Sequence[Any], tokenizer: Any, spec: RunSpec) -> Tokenised:
    """Rows of the objective's kind as columns; RequestError where none is short enough."""
    limit = spec.train.max_length
    kept: list[dict[str, Any]] = []
    cut = tokens = 0
    for row in rows:
        found = _columns(row, tokenizer, spec)
        lengths = _lengths(found)
        if _hopeless(found, lengths, spec):
            continue
        cut += any(length > limit for length in lengths)
        tokens += sum(min(length, limit) for length in lengths)
        kept.append(found)
    if not kept:
        what = f"none of the {len(rows)} rows leaves room for an answer within {limit} tokens"
        raise RequestError(Problem(what, None, "raise train.max_length"))
    return Tokenised(
        rows=Dataset.from_list([_shown(row) for row in kept]),
        num_examples=len(rows),
        num_truncated=cut,
        num_dropped=len(rows) - len(kept),
        num_split=0,
        num_refused=0,
        num_tokens=tokens,
        packing_efficiency=None,
        from_cache=False,
    )


def _columns(row: Any, tokenizer: Any, spec: RunSpec) -> dict[str, Any]:
    if isinstance(row, Question):
        prompt = [dict(turn) for turn in row.prompt]
        asked = chat_ids(tokenizer, row.prompt, ask=True)
        return {**row.extra, "prompt_ids": asked, "prompt": prompt, "answer": row.answer}
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    prompt_ids, parts = split(tokenizer, row.prompt, answers)
    if isinstance(spec.objective, Reward):
        return {"chosen_ids": prompt_ids + parts[0], "rejected_ids": prompt_ids + parts[1]}
    if isinstance(row, Judged):
        return {"prompt_ids": prompt_ids, "completion_ids": parts[0], "label": row.label}
    return {"prompt_ids": prompt_ids, "chosen_ids": parts[0], "rejected_ids": parts[1]}


def split(
    tokenizer: Any, prompt: Sequence[Turn] | str, answers: Sequence[Sequence[Turn] | str]
) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt [p] and of each answer to it: an answer begins where prompt and conversation part, which a
    template or a merged token may put before the prompt's end (`common_prefix_length`, TRL 1.16)."""
    if isinstance(prompt, str):
        asked = list(tokenizer(prompt)["input_ids"])
        whole = [list(tokenizer(prompt + _ended(str(answer), tokenizer.eos_token))["input_ids"]) for answer in answers]
    else:
        asked = chat_ids(tokenizer, prompt, ask=True)
        turns = [answer for answer in answers if not isinstance(answer, str)]
        whole = [chat_ids(tokenizer, [*prompt, *answer], ask=False) for answer in turns]
    start = min(_same(asked, ids) for ids in whole)
    return asked[:start], [ids[start:] for ids in whole]


def _ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _lengths(row: dict[str, Any]) -> list[int]:
    """Tokens of each sequence that a row stands for."""
    prompt = len(row.get("prompt_ids", ()))
    answers = [len(row[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
    return [prompt + answer for answer in answers] or [prompt]


def _hopeless(row: dict[str, Any], lengths: Sequence[int], spec: RunSpec) -> bool:
    """Nothing of an answer would be left: TRL drops these too. A reward is read at an answer's end: none may be cut."""
    limit = spec.train.max_length
    if isinstance(spec.objective, Reward):
        return max(lengths) > limit
    if isinstance(spec.objective, Grpo):
        return lengths[0] + spec.objective.max_new_tokens > limit
    return len(row["prompt_ids"]) >= limit


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Of a question the text alone: TRL renders and tokenises it before every generation."""
    return {key: value for key, value in row.items() if not ("prompt" in row and key == "prompt_ids")}
