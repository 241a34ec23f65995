"""Statistics of a data set: lengths, the effect of a maximum length, duplicates, learned tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypedDict

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Learnable, fingerprint
from runner.data.inspect.lengths import packed_sequences
from runner.data.inspect.token_counts import TokenCounter, tokenizer_file
from runner.data.load import read_dataset
from runner.data.loss_mask import IGNORED
from runner.errors import Problem, RequestError
from runner.spec import RunSpec

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SHARE_WHOLE = 0.99  # of the rows that the suggested length leaves whole
BINS = 24


class AtLength(TypedDict):
    """Truncation and fill rate for one maximum length."""

    max_length: int
    rows_cut: int
    tokens_cut: int
    packed_sequences: int
    packed_share: float
    padded_share: float


class Stats(TypedDict):
    """The object printed by `data stats --json`."""

    num_rows: int
    num_held_out: int
    num_skipped: int
    num_refused: int
    problems: list[dict[str, str | None]]
    how: str
    num_tokens: int
    num_learned: int | None
    length: dict[str, float]
    histogram: list[dict[str, int]]
    at_length: list[AtLength]
    suggested_max_length: int
    max_length: int
    duplicates: dict[str, int]


def stats(spec: RunSpec) -> Stats:
    """Facts for people and machines, of the training rows; RequestError for data that are wrong."""
    loaded = read_dataset(spec.data, spec.train.seed, spec.objective.learns_from)
    rows = loaded.train
    file = tokenizer_file(spec.model)
    counting = TokenCounter(spec.data, file)
    tokens, learned, refused = _counted(
        rows, spec, counting, ChatTokenizer.from_file(file, spec.data) if file else None
    )
    if not tokens:
        raise RequestError(*(refused or [Problem("no row is left to count")]))
    ordered = sorted(tokens)
    limits = [limit for limit in LENGTHS if limit <= max(2 * ordered[-1], LENGTHS[0])]
    limits = sorted({*limits, spec.train.max_length})
    return {
        "num_rows": len(rows),
        "num_held_out": len(loaded.held),
        "num_skipped": len({problem.source for problem in loaded.skipped}),
        "num_refused": len(refused),
        "problems": [vars(problem) for problem in (*loaded.skipped, *refused)],
        "how": counting.how,
        "num_tokens": sum(tokens),
        "num_learned": learned,
        "length": _quantiles(ordered),
        "histogram": histogram(ordered),
        "at_length": [_at(limit, tokens) for limit in limits],
        "suggested_max_length": suggested_length(ordered, spec.model.context_length),
        "max_length": spec.train.max_length,
        "duplicates": _duplicates(rows, loaded.held),
    }


def _counted(
    rows: Sequence[Learnable], spec: RunSpec, counting: TokenCounter, words: ChatTokenizer | None
) -> tuple[list[int], int | None, list[Problem]]:
    """Tokens of each row, how many are learned in all (None where nobody can say), and rows that cannot be rendered."""
    if words is None or not all(isinstance(row, Example) for row in rows):
        return counting.rows(rows), None, []
    loss_on = getattr(spec.objective, "loss_on", "all")
    tokens, learned, refused = [], 0, []
    for row in rows:
        assert isinstance(row, Example)
        try:
            found = words.encode(row, loss_on)
        except RequestError as error:
            refused += [Problem(p.what, row.where, p.remedy) for p in error.problems]
            continue
        tokens.append(len(found.ids))
        learned += sum(label != IGNORED for label in found.labels)
    return tokens, learned, refused


def _quantiles(ordered: Sequence[int]) -> dict[str, float]:
    at = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found: dict[str, float] = {name: ordered[round(q * (len(ordered) - 1))] for name, q in at.items()}
    return found | {"mean": sum(ordered) / len(ordered)}


def histogram(ordered: Sequence[int]) -> list[dict[str, int]]:
    """Rows by length in classes of equal, round width: `from`, `to` (left out), `rows`.

    At most 24, and for n rows about 2·∛n (the Rice rule): 8 for 60 rows, so that a class has some in it.
    """
    most = min(BINS, max(5, math.ceil(2 * len(ordered) ** (1 / 3))))
    width = next(w for w in _widths() if ordered[-1] // w - ordered[0] // w < most)
    counts = Counter(length // width for length in ordered)
    first, last = ordered[0] // width, ordered[-1] // width
    return [{"from": i * width, "to": (i + 1) * width, "rows": counts[i]} for i in range(first, last + 1)]


def _widths() -> Iterator[int]:
    return (factor * 10**power for power in range(9) for factor in (1, 2, 5))


def _at(limit: int, tokens: Sequence[int]) -> AtLength:
    """What a longest length of `limit` tokens cuts off, and how full sequences are with and without packing."""
    cut = [min(count, limit) for count in tokens]
    sequences = packed_sequences(cut, limit)
    longest = max(cut)
    return {
        "max_length": limit,
        "rows_cut": sum(count > limit for count in tokens),
        "tokens_cut": sum(tokens) - sum(cut),
        "packed_sequences": sequences,
        "packed_share": sum(cut) / (sequences * limit),
        "padded_share": sum(cut) / (len(cut) * longest),
    }


def suggested_length(ordered: Sequence[int], context: int | None) -> int:
    """The least multiple of 64 tokens that leaves 99% of the rows whole, within what the model can read."""
    wanted = ordered[round(SHARE_WHOLE * (len(ordered) - 1))]
    length = max(64, -(-wanted // 64) * 64)
    return min(length, context) if context else length


def _duplicates(rows: Sequence[Learnable], held: Sequence[Learnable]) -> dict[str, int]:
    """Rows that say the same as an earlier one, or as a held-out one; and the same question, whatever the answer."""
    keys = Counter(fingerprint([row]) for row in rows)
    prompts = Counter(str(row.prompt) for row in rows if row.prompt)
    out = {fingerprint([row]) for row in held}
    return {
        "rows": sum(count - 1 for count in keys.values()),
        "prompts": sum(count - 1 for count in prompts.values()),
        "held_out_in_train": sum(key in out for key in keys),
    }
