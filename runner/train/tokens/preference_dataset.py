"""Columns of preferences, marked answers and prompts, cached.

So what is cut and dropped is known and said, and every process finds the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Features, Json
from datasets.arrow_writer import ArrowWriter

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Learnable, fingerprint
from runner.data.readers.files import raise_problems
from runner.data.tokenize_rows import PreferenceSettings, encode_preferences, in_chunks
from runner.errors import Problem, RequestError
from runner.report.text import counted
from runner.spec import RunSpec
from runner.train.tokens.token_cache import ROWS, OnProgress, Tokenised, cached_rows, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenise(
    rows: Sequence[Learnable], tokenizer: PreTrainedTokenizerBase, spec: RunSpec, settings: PreferenceSettings,
    features: Features, on_progress: OnProgress | None = None,
) -> Tokenised:  # fmt: skip
    """Rows of the objective's kind, tokenised in the columns of `features`, or from the cache.

    RequestError with every row that the template refuses (unless `data.on_error=skip`), or where none is short enough.
    """
    parts = ["pairs", fingerprint(rows), tokenizer_fingerprint(tokenizer), vars(settings), spec.data.on_error]
    return cached_rows(parts, lambda folder: _write(rows, tokenizer, spec, settings, features, folder, on_progress))


def _write(
    rows: Sequence[Learnable], tokenizer: PreTrainedTokenizerBase, spec: RunSpec, settings: PreferenceSettings,
    features: Features, folder: Path, on_progress: OnProgress | None,
) -> dict[str, Any]:  # fmt: skip
    """Rows of the entry into `folder`; its facts."""
    counts = dict.fromkeys(("truncated", "dropped", "tokens", "prompt_differs", "conversations"), 0)
    done = kept = refused = 0
    problems: list[Problem] = []
    with ArrowWriter(path=str(folder / ROWS), features=features) as writer:
        encode = partial(encode_preferences, settings=settings)
        for chunk in in_chunks(encode, ChatTokenizer.of(tokenizer), rows, spec.data.num_proc):
            for row in chunk.rows:
                writer.write({name: _stored(row.get(name), features[name]) for name in writer.schema.names})
            counts = {name: count + getattr(chunk, name) for name, count in counts.items()}
            kept += len(chunk.rows)
            refused += len({problem.source for problem in chunk.problems})
            problems += chunk.problems[: 1000 - len(problems)]
            done += chunk.examples + len(chunk.problems)
            if on_progress is not None:
                on_progress(min(done, len(rows)), len(rows))
        writer.finalize()
    if problems and (spec.data.on_error == "stop" or not kept):
        raise_problems(problems)
    if not kept:
        what = f"no room for an answer within {settings.limit} tokens, in {counted(len(rows), 'row')}"
        raise RequestError(Problem(what, None, "raise train.max_length"))
    return {
        "num_examples": len(rows),
        **{f"num_{name}": count for name, count in counts.items()},
        "num_refused": refused,
    }


def _stored(value: Any, feature: Any) -> Any:
    """As `Json` keeps it: given text it would store "007" as 7, and given a number 10 of its digits (datasets 5.2)."""
    return json.dumps(value) if isinstance(feature, Json) and value is not None else value
