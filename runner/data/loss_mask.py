"""The loss mask: which characters of a rendered conversation the model would have to generate.

A template that marks them (`{% generation %}`) is believed. Any other is asked: what does the text look like up to this
turn, and with it? The difference is what the turn says, from where the model begins to generate to the token that ends
the turn. Some templates rewrite earlier turns (Qwen3 and DeepSeek drop their thoughts); there the turn is found by
saying something else in it and looking what changes. What comes out is checked: a turn that does not hold its own
words is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.data.chat_template import CALL_OF_MARKS, MARK, Template, check_given, left_out_problem, missing_part
from runner.data.examples import Example, Tool, Turn
from runner.errors import Problem, RequestError

IGNORED = -100
"""torch's cross_entropy leaves these labels out."""

Span = tuple[int, int]


def common_prefix_length(one: str, other: str) -> int:
    """Return the number of common leading characters."""
    if other.startswith(one):
        return len(one)
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _whole_tags(text: str, end: int) -> int:
    """`end`, or where the tag begins that it would cut in two: <th|ink> and <th|under> have nothing in common."""
    begin = text.rfind("<", 0, end)
    return begin if begin >= 0 and ">" not in text[begin:end] else end


class TurnFinder:
    """Finds the assistant's words in conversations of one template."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.closing, self.opening = self._frame()

    def _frame(self) -> tuple[str, str]:
        """What stands after an answer up to its last visible character, and what asks for one."""
        question: Turn = {"role": "user", "content": "?"}
        answer: Turn = {"role": "assistant", "content": MARK}
        try:
            whole = self.template.render([question, answer, question, answer]).text
            asked, not_asked = (self.template.render([question], ask=ask).text for ask in (True, False))
        except Exception:  # a template may refuse in any way; then the difference of the turns has to do
            return "", ""
        _, inside, last = (*whole.split(MARK), "", "")[:3]
        # Phi-3 puts one more token behind the last answer, and behind what does not ask for one.
        closing = inside[: _whole_tags(inside, common_prefix_length(inside, last))]
        return closing.rstrip(), asked[_whole_tags(asked, common_prefix_length(asked, not_asked)) :]

    def spans(self, turns: Sequence[Turn], tools: Sequence[Tool], text: str, marks: Sequence[Span]) -> dict[int, Span]:
        """Index of each assistant turn → [begin, end) of what it says in `text`, the rendered whole.

        RequestError where that cannot be told.
        """
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(marks) == len(answers):
            found = dict(zip(answers, marks, strict=True))
        else:
            found = {}
            for index in answers:
                last = max((end for _, end in found.values()), default=0)
                found[index] = self._span(turns, index, tools, text, last)
        self._check(turns, text, found)
        return found

    def _span(self, turns: Sequence[Turn], index: int, tools: Sequence[Tool], text: str, last: int) -> Span:
        before = self._text(turns[:index], tools, ask=True)
        after = self._text(turns[: index + 1], tools) if index + 1 < len(turns) else text
        if before and after and text.startswith(before) and text.startswith(after) and len(before) < len(after):
            return len(before), self._without_trailing(after)
        begin, end = self.changed(turns, index, tools, text)
        alike = common_prefix_length(before or "", text)
        if alike >= last and alike:
            start = min(_whole_tags(text, alike), begin)
        else:
            at = text.rfind(self.opening, last, begin) if self.opening else -1
            start = at + len(self.opening) if at >= 0 else begin
        if after and text.startswith(after) and len(after) >= end:
            return start, self._without_trailing(after)
        if turns[index].get("tool_calls") or not turns[index]["content"]:  # the template's words may follow them
            following = self.changed(turns, index + 1, tools, text)[0] if index + 1 < len(turns) else len(text)
            at = text.find(self.closing, end, following) if self.closing else -1
            return start, at + len(self.closing) if at >= 0 else end
        return start, end + len(self.closing) if text.startswith(self.closing, end) else end

    def _without_trailing(self, after: str) -> int:
        """The length up to the token that ends the turn: a line break behind it is the template's."""
        stripped = after.rstrip()
        return len(stripped) if self.closing and stripped.endswith(self.closing) else len(after)

    def _text(self, turns: Sequence[Turn], tools: Sequence[Tool], ask: bool = False) -> str | None:
        try:
            return self.template.render(turns, ask, tools).text
        except Exception:  # half a conversation may be one that the template refuses
            return None

    def changed(self, turns: Sequence[Turn], index: int, tools: Sequence[Tool], text: str) -> Span:
        """Return the span of `text` that changes with the content of turn `index`."""
        other: Turn = {**turns[index]}
        if other["content"]:
            other["content"] = MARK
        if other.get("reasoning_content"):
            other["reasoning_content"] = MARK
        if other.get("tool_calls"):
            other["tool_calls"] = [CALL_OF_MARKS] * len(other["tool_calls"])
        return self._different(turns, index, other, tools, text)

    def _different(self, turns: Sequence[Turn], index: int, other: Turn, tools: Sequence[Tool], text: str) -> Span:
        changed = self._text([*turns[:index], other, *turns[index + 1 :]], tools) or ""
        begin = common_prefix_length(text, changed)
        room = min(len(text), len(changed)) - begin
        end = common_prefix_length(text[::-1][:room], changed[::-1][:room])
        return begin, len(text) - end

    def _check(self, turns: Sequence[Turn], text: str, spans: dict[int, Span]) -> None:
        """Every turn stands after the one before."""
        last = 0
        for index, (begin, end) in spans.items():
            if begin < last or end < begin:
                raise _unclear(index)
            last = end

    def dropped(self, turns: Sequence[Turn], tools: Sequence[Tool], text: str, spans: dict[int, Span]) -> set[int]:
        """Turns that `text` shows without something that they say, as the conversation goes on after them.

        Some templates drop earlier thoughts (Qwen3, DeepSeek, gpt-oss). To learn such a turn would teach to answer
        without them. RequestError for what the template never shows, not even where the turn is the last.
        """
        found = set()
        for index, (begin, end) in spans.items():
            lacks = missing_part(turns[index], text[begin:end])
            if lacks is None:
                continue
            if (
                index + 1 < len(turns)
                and missing_part(turns[index], self._text(turns[: index + 1], tools) or "") is None
            ):
                found.add(index)
            else:
                raise _unclear(index) if lacks == "content" else left_out_problem(lacks, index)
        return found

    def pieces(self, turns: Sequence[Turn], index: int, tools: Sequence[Tool], text: str, span: Span) -> list[Span]:
        """A turn without what tools answer to it, which some templates (Gemma's) put inside the assistant's turn.

        RequestError where the two cannot be told apart.
        """
        if index + 1 == len(turns) or turns[index + 1]["role"] != "tool":
            return [span]
        begin, end = span
        results = [i for i in range(index + 1, len(turns)) if turns[i]["role"] == "tool" and turns[i]["content"]]
        alone = self._text(turns[: index + 1], tools) or ""
        cut = _whole_tags(text, common_prefix_length(alone, text))  # what follows is not what the turn says by itself
        unclosed = not (self.closing and text[begin:end].endswith(self.closing))
        if begin < cut and (cut < end or unclosed):
            answers = [self.changed(turns, i, tools, text) for i in results]
            words = self._different(turns, index, {**turns[index], "content": MARK}, tools, text)
            after = [(words[0], end)] if answers and answers[-1][1] <= words[0] < end else []  # Gemma 4's place for it
            found = [(begin, len(text[:cut].rstrip())), *after]
            if missing_part(turns[index], "".join(text[a:b] for a, b in found)) is None:
                return found
        if any(first < end and begin < last for first, last in (self.changed(turns, i, tools, text) for i in results)):
            what = f"the chat template puts what a tool answers inside turn {index + 1}, where it would be learned"
            raise RequestError(Problem(what, None, "set data.chat_template to one that keeps them apart, such as qwen"))
        return [span]


def _unclear(index: int) -> RequestError:
    what = f"the chat template does not show which words of turn {index + 1} are the assistant's"
    remedy = "mark them in it with {% generation %} … {% endgeneration %}, or write objective.loss_on=all"
    return RequestError(Problem(what, None, remedy))


@dataclass(frozen=True)
class Learned:
    """Spans of a rendered conversation that the loss is taken on."""

    spans: list[Span]
    """[begin, end) in characters, in order."""
    num_dropped: int = 0
    """Turns that are not learned, because the template drops a part of what they say."""


def learned_spans(example: Example, loss_on: str, text: str, marks: Sequence[Span], turns: TurnFinder) -> Learned:
    """Return the learned spans of `text`, the rendered conversation; `loss_on` as in `Sft`."""
    said, tools = [*example.prompt, *example.completion], example.tools
    check_given(turns.template, said, tools, text)
    answers = {index: (0, len(text)) for index, turn in enumerate(said) if turn["role"] == "assistant"}
    weighted = {index for index in answers if said[index].get("weight", 1)}
    unweighted = all(turn.get("weight", 1) for turn in said)
    if loss_on == "all" and unweighted and not turns.dropped(said, tools, text, answers):
        return Learned([(0, len(text))])
    pair = loss_on == "completion" or (loss_on == "auto" and not example.dialogue)
    if pair and unweighted and not marks and all(turn["role"] == "assistant" for turn in example.completion):
        asked = turns.template.render(example.prompt, True, tools).text
        begin = common_prefix_length(asked, text)  # as TRL: from where the prompt asks, to the end
        if begin < len(asked):  # what asks is not in the text: an answer may begin like it
            begin = min(begin, turns.changed(said, len(example.prompt), tools, text)[0])
        span = (begin, len(text))
        if not turns.dropped(said, tools, text, dict.fromkeys(range(len(example.prompt), len(said)), span)):
            return Learned([span])
    spans = turns.spans(said, tools, text, marks)
    if pair:
        spans = {index: span for index, span in spans.items() if index >= len(example.prompt)}
    elif loss_on == "last":
        spans = dict(list(spans.items())[-1:])
    kept = {index: span for index, span in spans.items() if index in weighted}
    dropped = turns.dropped(said, tools, text, kept)
    if loss_on == "all":  # but for the turns that weigh nothing, or of which something is missing
        silent = [span for index, span in spans.items() if index in dropped or index not in kept]
        return Learned(_without(silent, len(text)), len(dropped))
    pieces = [turns.pieces(said, index, tools, text, kept[index]) for index in kept if index not in dropped]
    return Learned([span for found in pieces for span in found], len(dropped))


def _without(silent: Sequence[Span], length: int) -> list[Span]:
    edges = [0, *(edge for span in silent for edge in span), length]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


def labels_of(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels [s]: the id of every token that holds a character of a span, else -100; `offsets` in characters."""
    labels = [IGNORED] * len(ids)
    left = iter(sorted(spans))
    span = next(left, None)
    for index, (begin, end) in enumerate(offsets):
        while span is not None and begin >= span[1]:
            span = next(left, None)
        if span is None:
            break
        if end > span[0]:
            labels[index] = ids[index]
    return labels
