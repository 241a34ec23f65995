"""What training would see of a data set: rows as the template shows them, and what is wrong with which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner.data.examples import Example, Learnable, Preference, Turn, content_of, kind_of
from runner.data.formats import Found, inspect
from runner.data.masks import IGNORED
from runner.data.tokens import tokenizer_file
from runner.data.words import Encoded, Words
from runner.errors import Problem, RequestError
from runner.spec import RunSpec


def preview(spec: RunSpec, count: int = 3, row: int | None = None) -> dict[str, Any]:
    """Facts for people and machines: files with their formats, rows with the tokens that are learned, all mistakes.

    Rows are the first `count`, or number `row` (1-based, over all files). Without the model's tokenizer on this machine
    they are shown by turns instead of tokens. RequestError where there is nothing to read, or no such row.
    """
    kind = kind_of(spec.objective.name)
    files, held = inspect(spec.data, kind)
    rows = [one for found in files for one in found.rows]
    file = tokenizer_file(spec.model)
    words = Words.from_file(file, spec.data) if file else None
    chosen = _chosen(rows, count, row)
    problems = [problem for found in (*files, *held) for problem in found.problems]
    loss_on = getattr(spec.objective, "loss_on", "all")
    shown = []
    for number, example in chosen:
        try:
            segments = list(_segments(example, words, loss_on))
        except RequestError as error:
            problems += [Problem(p.what, example.where, p.remedy) for p in error.problems]
            continue
        shown.append({"row": number, "where": example.where, "content": content_of(example), "segments": segments})
    return {
        "objective": spec.objective.name,
        "learns_from": kind,
        "files": [_facts(found) for found in files],
        "held_out_files": [_facts(found) for found in held],
        "num_rows": len(rows),
        "tokenizer": str(file) if file else None,
        "max_length": spec.train.max_length,
        "rows": shown,
        "problems": [vars(problem) for problem in problems],
        "on_error": spec.data.on_error,
    }


def _chosen(rows: Sequence[Learnable], count: int, row: int | None) -> list[tuple[int, Learnable]]:
    if row is None:
        return list(enumerate(rows[:count], 1))
    if not 1 <= row <= len(rows):
        raise RequestError(Problem(f"there is no row {row} among {len(rows):,} that are right", "--row"))
    return [(row, rows[row - 1])]


def _facts(found: Found) -> dict[str, Any]:
    wrong = len({problem.source for problem in found.problems})
    return {"name": found.name, "format": found.shape, "num_rows": len(found.rows), "num_wrong": wrong}


def _segments(row: Learnable, words: Words | None, loss_on: str) -> Iterator[dict[str, Any]]:
    """Pieces of the row in order: `text`, `trained`, and the `part` they belong to where a row has several."""
    if isinstance(row, Preference):
        for name, said in (("chosen", row.chosen), ("rejected", row.rejected)):
            example = _joined(row.prompt, said, row)
            for piece in _pieces(example, words, "completion" if example.text is None else "all"):
                yield piece | {"part": name}
    elif isinstance(row, Example):
        yield from _pieces(row, words, loss_on)
    else:
        completion = getattr(row, "completion", [])
        yield from _pieces(Example(row.prompt, completion), words if completion else None, "completion")


def _joined(prompt: list[Turn] | str, said: list[Turn] | str, row: Preference) -> Example:
    if isinstance(prompt, str):
        return Example(text=f"{prompt}{said}")
    assert not isinstance(said, str)
    return Example(prompt, said, tools=row.tools)


def _pieces(example: Example, words: Words | None, loss_on: str) -> Iterator[dict[str, Any]]:
    if words is not None:
        yield from _tokens(words.encode(example, loss_on), words)
        return
    if example.text is not None or example.ids is not None:
        yield {"text": example.text or " ".join(map(str, example.ids or [])), "trained": True, "tokens": None}
    for learned, turns in ((example.dialogue, example.prompt), (True, example.completion)):
        for turn in turns:
            trained = learned and turn["role"] == "assistant" and bool(turn.get("weight", 1))
            yield {"text": f"[{turn['role']}] ", "trained": False, "tokens": None}
            yield {"text": f"{turn['content']}\n", "trained": trained or loss_on == "all", "tokens": None}


def _tokens(encoded: Encoded, words: Words) -> Iterator[dict[str, Any]]:
    """Neighbouring tokens that are all learned, or all not, as one piece."""
    begin = 0
    flags = [label != IGNORED for label in encoded.labels]
    for index in range(1, len(flags) + 1):
        if index == len(flags) or flags[index] != flags[begin]:
            ids = encoded.ids[begin:index]
            text = words.backend.decode(ids, skip_special_tokens=False)
            if encoded.offsets:  # as it was written: decoding may lose spaces
                text = encoded.text[encoded.offsets[begin][0] : encoded.offsets[index - 1][1]] or text
            yield {"text": text, "trained": flags[begin], "tokens": len(ids)}
            begin = index
