"""Columns of preferences, marked answers and prompts, cached.

So what is cut and dropped is known and said, and every process finds the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Features, Json, List, Value
from datasets.arrow_writer import ArrowWriter

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Learnable, PromptExample, fingerprint
from runner.data.preference_tokens import TOOLS, PreferenceSettings, encode_preferences
from runner.data.readers.files import refuse
from runner.data.tokenize_rows import in_chunks
from runner.errors import Problem, RequestError
from runner.spec import Grpo, Kto, Reward, RunSpec
from runner.train.token_cache import ROWS, Tell, Tokenised, stored, tokenizer_fingerprint


def tokenise(rows: Sequence[Learnable], tokenizer: Any, spec: RunSpec, tell: Tell | None = None) -> Tokenised:
    """Rows of the objective's kind, tokenised or from the cache.

    RequestError with every row that the template refuses (unless `data.on_error=skip`), or where none is short enough.
    """
    settings = _settings(spec)
    parts = ["pairs", fingerprint(rows), tokenizer_fingerprint(tokenizer), vars(settings), spec.data.on_error]
    return stored(parts, lambda folder: _write(rows, tokenizer, spec, settings, folder, tell))


def _settings(spec: RunSpec) -> PreferenceSettings:
    """A reward is read at an answer's end, so none may be cut; GRPO's answers are as long as it lets them become."""
    room = spec.objective.max_new_tokens if isinstance(spec.objective, Grpo) else 1
    return PreferenceSettings(spec.train.max_length, room, isinstance(spec.objective, Reward))


def _write(
    rows: Sequence[Learnable],
    tokenizer: Any,
    spec: RunSpec,
    settings: PreferenceSettings,
    folder: Path,
    tell: Tell | None,
) -> dict[str, Any]:
    """Rows of the entry into `folder`; its facts."""
    counts = dict.fromkeys(("truncated", "dropped", "tokens", "prompt_differs", "conversations"), 0)
    done = kept = refused = 0
    problems: list[Problem] = []
    features = _features(rows, spec)
    with ArrowWriter(path=str(folder / ROWS), features=features) as writer:
        for chunk in in_chunks(
            partial(encode_preferences, settings=settings), ChatTokenizer.of(tokenizer), rows, spec.data.num_proc
        ):
            for row in chunk.rows:
                writer.write({name: _stored(row.get(name), features[name]) for name in writer.schema.names})
            counts = {name: count + getattr(chunk, name) for name, count in counts.items()}
            kept += len(chunk.rows)
            refused += len({problem.source for problem in chunk.problems})
            problems += chunk.problems[: 1000 - len(problems)]
            done += chunk.examples + len(chunk.problems)
            if tell is not None:
                tell(min(done, len(rows)), len(rows))
        writer.finalize()
    if problems and (spec.data.on_error == "stop" or not kept):
        refuse(problems)
    if not kept:
        what = f"none of the {len(rows)} rows leaves room for an answer within {settings.limit} tokens"
        raise RequestError(Problem(what, None, "raise train.max_length"))
    return {
        "num_examples": len(rows),
        **{f"num_{name}": count for name, count in counts.items()},
        "num_split": 0,
        "num_unlearned": 0,
        "num_refused": refused,
        "packing_efficiency": None,
    }


def _stored(value: Any, feature: Any) -> Any:
    """As `Json` keeps it: given text it would store "007" as 7, and given a number 10 of its digits (datasets 5.2)."""
    return json.dumps(value) if isinstance(feature, Json) and value is not None else value


def _features(rows: Sequence[Learnable], spec: RunSpec) -> Features:
    """Of questions the turns and the extra fields may be of any shape: Arrow's own columns would fill a tool call with
    the arguments of all others."""
    ids = List(Value("int32"))
    if isinstance(spec.objective, Grpo):
        extra = dict.fromkeys(name for row in rows if isinstance(row, PromptExample) for name in row.extra)
        return Features({**dict.fromkeys(extra, Json()), "prompt": Json(), "answer": Json(), TOOLS: Json()})
    if isinstance(spec.objective, Kto):
        names: tuple[str, ...] = "prompt_ids", "completion_ids", "completion_given"
        return Features({**dict.fromkeys(names, ids), "label": Value("bool")})
    if isinstance(spec.objective, Reward):
        return Features(dict.fromkeys(("chosen_ids", "rejected_ids"), ids))
    names = "prompt_ids", "chosen_ids", "chosen_given", "rejected_ids", "rejected_given"
    return Features(dict.fromkeys(names, ids))
