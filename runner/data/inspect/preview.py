"""Rows as training sees them: rendered, with the learned tokens marked and problems by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypedDict

from runner.data.chat_tokenizer import ChatTokenizer, Encoded
from runner.data.examples import Example, Kind, Learnable, Preference, Turn, UnpairedExample, content_of
from runner.data.inspect.token_counts import tokenizer_file
from runner.data.load import InspectedFile, inspect_files
from runner.data.loss_mask import IGNORED
from runner.data.tokenize_rows import given_spans, split_prompt
from runner.errors import Problem, RequestError
from runner.spec import RunSpec


class _Segment(TypedDict):
    text: str
    trained: bool
    tokens: int | None
    """None where the tokenizer is not here."""


class Segment(_Segment, total=False):
    """A piece of a row, learned or not."""

    part: str
    """Which answer it belongs to, where a row has several."""


class PreviewedFile(TypedDict):
    """A file, or a split of the Hub, and what was found in it."""

    name: str
    format: str | None
    num_rows: int
    num_wrong: int
    left_out: list[str]
    rewarded: list[str]


class PreviewedRow(TypedDict):
    """A row as it was read, and as it is learned."""

    row: int
    where: str
    content: dict[str, object]
    segments: list[Segment]


class Preview(TypedDict):
    """The object printed by `data preview --json`."""

    objective: str
    learns_from: Kind
    files: list[PreviewedFile]
    held_out_files: list[PreviewedFile]
    num_rows: int
    tokenizer: str | None
    max_length: int
    rows: list[PreviewedRow]
    problems: list[dict[str, str | None]]
    on_error: Literal["stop", "skip"]


def preview(spec: RunSpec, count: int = 3, row: int | None = None) -> Preview:
    """Facts for people and machines: files with their formats, rows with the tokens that are learned, all mistakes.

    Rows are the first `count`, or number `row` (1-based, over all files). Without the model's tokenizer on this machine
    they are shown by turns instead of tokens. RequestError where there is nothing to read, or no such row.
    """
    kind = spec.objective.learns_from
    files, held = inspect_files(spec.data, kind)
    rows = [one for found in files for one in found.rows]
    file = tokenizer_file(spec.model)
    words = ChatTokenizer.from_file(file, spec.data) if file else None
    chosen = _chosen(rows, count, row)
    problems = [problem for found in (*files, *held) for problem in found.problems]
    loss_on = getattr(spec.objective, "loss_on", "all")
    whole = spec.objective.scores
    if words and kind != "prompts" and any(_is_conversation(example) for _, example in chosen):
        try:
            words.check_end()
        except RequestError as error:
            problems += error.problems
    shown: list[PreviewedRow] = []
    for number, example in chosen:
        try:
            segments = list(_segments(example, words, loss_on, whole))
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


def _is_conversation(row: Learnable) -> bool:
    return getattr(row, "ids", None) is None and getattr(row, "text", None) is None and not isinstance(row.prompt, str)


def _facts(found: InspectedFile) -> PreviewedFile:
    wrong = len({problem.source for problem in found.problems})
    return {
        "name": found.name,
        "format": found.shape,
        "num_rows": len(found.rows),
        "num_wrong": wrong,
        "left_out": found.left_out,
        "rewarded": found.rewarded,
    }


def _segments(row: Learnable, words: ChatTokenizer | None, loss_on: str, whole: bool = False) -> Iterator[Segment]:
    """Pieces of the row in order: `text`, `trained`, and the `part` they belong to where a row has several; `whole`:
    answers are judged with everything in them."""
    if isinstance(row, Example):
        yield from _pieces(row, words, loss_on)
    elif isinstance(row, Preference):
        yield from _compared(row, {"chosen": row.chosen, "rejected": row.rejected}, words, whole)
    elif isinstance(row, UnpairedExample):
        yield from _compared(row, {"": row.completion}, words)
    elif words is not None:
        text = words.prompt_text(row.prompt, row.tools)
        yield {"text": text, "trained": False, "tokens": len(words.token_ids([text])[0])}
    else:
        yield from _turns(row.prompt, lambda _: False)


def _compared(
    row: Preference | UnpairedExample, answers: dict[str, list[Turn] | str], words: ChatTokenizer | None,
    whole: bool = False,
) -> Iterator[Segment]:  # fmt: skip
    """A prompt with each of its answers, of which every token counts; but what users and tools say in one is given,
    unless the `whole` is judged."""
    prompt, parts = split_prompt(words, row.prompt, list(answers.values()), row.tools) if words else ([], [])
    for index, (name, answer) in enumerate(answers.items()):
        if words is not None:
            spans = [] if whole else given_spans(words, row.prompt, answer, row.tools, len(prompt))
            pieces = _decoded(words, prompt + parts[index], len(prompt), [edge for span in spans for edge in span])
        elif isinstance(answer, str):
            parts_of_text = ((str(row.prompt), False), (answer, True))
            pieces = [{"text": text, "trained": trained, "tokens": None} for text, trained in parts_of_text]
        else:
            learned = _turns(answer, lambda turn: whole or turn["role"] == "assistant")
            pieces = [*_turns(row.prompt, lambda _: False), *learned]
        yield from (piece | {"part": name} if name else piece for piece in pieces)


def _decoded(words: ChatTokenizer, ids: Sequence[int], start: int, edges: Sequence[int]) -> list[Segment]:
    """The ids as pieces, given and learned in turn: the prompt up to `start`, from there up to each edge."""
    begin, known = 0, ""
    pieces: list[Segment] = []
    for index, end in enumerate([start, *(start + edge for edge in edges), len(ids)]):
        text = words.backend.decode(ids[:end], skip_special_tokens=False)
        if end > begin or not edges:  # decoded alone, a piece may lose the space that it begins with
            pieces.append({"text": text.removeprefix(known), "trained": index % 2 == 1, "tokens": end - begin})
        begin, known = end, text
    return pieces


def _pieces(example: Example, words: ChatTokenizer | None, loss_on: str) -> Iterator[Segment]:
    if words is not None:
        yield from _tokens(words.encode(example, loss_on), words)
        return
    if example.text is not None or example.ids is not None:
        yield {"text": example.text or " ".join(map(str, example.ids or [])), "trained": True, "tokens": None}

    def learned(turn: Turn) -> bool:
        return turn["role"] == "assistant" and bool(turn.get("weight", 1))

    yield from _turns(example.prompt, lambda turn: loss_on == "all" or (example.dialogue and learned(turn)))
    yield from _turns(example.completion, lambda turn: loss_on == "all" or learned(turn))


def _turns(turns: Sequence[Turn] | str, learned: Callable[[Turn], bool]) -> Iterator[Segment]:
    for turn in turns if not isinstance(turns, str) else ():
        yield {"text": f"[{turn['role']}] ", "trained": False, "tokens": None}
        thought = f"{turn['reasoning_content']}\n" if turn.get("reasoning_content") else ""
        yield {"text": f"{thought}{turn['content']}\n", "trained": learned(turn), "tokens": None}


def _tokens(encoded: Encoded, words: ChatTokenizer) -> Iterator[Segment]:
    """Neighbouring tokens that are all learned, or all not, as one piece."""
    begin = 0
    flags = [label != IGNORED for label in encoded.labels]
    for index in range(1, len(flags) + 1):
        if index == len(flags) or flags[index] != flags[begin]:
            ids = encoded.ids[begin:index]
            text = _shown(ids, encoded.offsets[begin:index], encoded.text, words)
            yield {"text": text, "trained": flags[begin], "tokens": len(ids)}
            begin = index


def _shown(ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, words: ChatTokenizer) -> str:
    """The text of tokens as it was written, as decoding may lose spaces, with the tokens that were put around it."""
    inside = [index for index, (begin, end) in enumerate(offsets) if begin < end]
    if not inside:
        return str(words.backend.decode(ids, skip_special_tokens=False))
    first, last = inside[0], inside[-1] + 1
    before, after = (words.backend.decode(part, skip_special_tokens=False) for part in (ids[:first], ids[last:]))
    return f"{before}{text[offsets[first][0] : offsets[last - 1][1]]}{after}"
