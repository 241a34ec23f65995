"""A tokenizer with its chat template, without transformers: rows → token ids and labels.

Small enough to be sent to the processes that tokenise, and loaded in a moment for a preview.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.config import json_text
from runner.data.chat_template import (
    CALL_OF_MARKS,
    MARK,
    Message,
    Template,
    refused,
    render_checked,
    template_source,
    with_tool_template,
)
from runner.data.examples import Example, Tool, Turn
from runner.data.loss_mask import IGNORED, Learned, TurnFinder, labels_of, learned_spans
from runner.data.readers.files import kind_of
from runner.errors import Problem, RequestError
from runner.spec import DataSpec

FALLBACK = "chatml"
"""A model without a chat template gets this one."""


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it."""

    ids: list[int]
    labels: list[int]
    """-100 where no loss is taken."""
    offsets: list[tuple[int, int]]
    """[begin, end) of each token in `text`; empty for a row that came tokenised."""
    text: str
    num_dropped: int = 0
    """Turns that are not learned, because the template drops a part of what they say."""
    prompt_differs: bool = False
    """The answer does not begin where the template asks for one: see `ChatTokenizer.prompt_differs`."""


class ChatTokenizer:
    """Renders and tokenises; what transformers' fast tokenizer of the same files does."""

    def __init__(self, body: str, template: str, special: dict[str, str]) -> None:
        """`body` is the content of tokenizer.json, `template` Jinja, `special` the special tokens by their names."""
        self.body, self.special = body, special
        backend = import_module("tokenizers").Tokenizer.from_str(body)  # 75 ms for SmolLM2's
        backend.no_truncation()
        backend.no_padding()
        self.backend: Any = backend
        self._use(template)
        self.bos_id, self.end_id = (
            backend.token_to_id(special[name]) if name in special else None for name in ("bos_token", "eos_token")
        )

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[str, str, dict[str, str]]]:
        return type(self), (self.body, self.turns.template.source, self.special)

    def _use(self, template: str) -> None:
        self.turns = TurnFinder(Template(template, self.special))

    def encode(self, example: Example, loss_on: str) -> Encoded:
        """Token ids and labels of one example; RequestError where the template refuses it or hides who speaks."""
        return self.encode_all([example], loss_on)[0]

    def encode_all(self, examples: Sequence[Example], loss_on: str) -> list[Encoded]:
        """The same for many; RequestError of the first one that is wrong."""
        texts = [self._prepared(example, loss_on) for example in examples]
        plain = [index for index, example in enumerate(examples) if example.text is not None]
        chats = [index for index, example in enumerate(examples) if example.text is None and example.ids is None]
        found: dict[int, Encoded] = {}
        for group, special in ((plain, True), (chats, False)):
            encodings = self.backend.encode_batch([texts[i][0] for i in group], add_special_tokens=special)
            for index, encoding in zip(group, encodings, strict=True):
                text, shown = texts[index]
                ids = with_bos(encoding.ids, self.bos_id)
                offsets = list(encoding.offsets)[-len(ids) :] if ids else []
                if special:
                    found[index] = self._ended(ids, offsets, text)
                else:
                    labels = labels_of(ids, offsets, shown.spans)
                    example = examples[index]
                    differs = self.prompt_differs(example.prompt, example.completion, example.tools)
                    found[index] = Encoded(ids, labels, offsets, text, shown.num_dropped, differs)
        for index, example in enumerate(examples):
            if example.ids is not None:
                self._check_ids(example.ids, example.labels or ())
                found[index] = Encoded(example.ids, example.labels or list(example.ids), [], "")
        return [found[index] for index in range(len(examples))]

    def _check_ids(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """RequestError for ids that the tokenizer has no token for: the embedding would have no row for them."""
        wrong = [id for id in ids if not 0 <= id < self._size]
        wrong += [label for label in labels if label != IGNORED and not 0 <= label < self._size]
        if wrong:
            what = f"token id {wrong[0]} is outside the model's vocabulary of {self._size:,} tokens"
            remedy = f"tokenise the rows with this model's tokenizer; a label that is not learned is {IGNORED}"
            raise RequestError(Problem(what, None, remedy))

    @cached_property
    def _size(self) -> int:
        return 1 + max(self.backend.get_vocab().values(), default=-1)

    def _prepared(self, example: Example, loss_on: str) -> tuple[str, Learned]:
        """The text to tokenise and the spans of it to learn."""
        if example.ids is not None:
            return "", Learned([])
        if example.text is not None:
            return example.text, Learned([])
        said = [*example.prompt, *example.completion]
        with _refusals(said):
            shown = self.turns.template.render(said, tools=example.tools)
            found = learned_spans(example, loss_on, shown.text, shown.marks, self.turns)
        text = self._closed(shown.text, said)
        last = found.spans[-1][1] if found.spans else 0
        if len(text) > len(shown.text) and last >= len(shown.text.rstrip()):
            return text, Learned([*found.spans, (len(shown.text), len(text))], found.num_dropped)
        return text, found

    def _closed(self, text: str, turns: Sequence[Turn]) -> str:
        """With the end of text after an answer that the template ends with nothing: GLM's leave that to the turn after
        it, so from the last one nobody could learn to stop."""
        open_end = turns[-1]["role"] == "assistant" and self._tails[0] is not None and not self._tails[0].strip()
        return self.ended(text) if open_end else text

    @cached_property
    def _tails(self) -> tuple[str | None, str | None]:
        """What the template puts behind an answer, and behind a call of a tool, that is the last turn."""
        answers: list[Turn] = [
            {"role": "assistant", "content": MARK},
            {"role": "assistant", "content": "", "tool_calls": [CALL_OF_MARKS]},
        ]
        found: list[str | None] = []
        for answer in answers:
            text = ""
            with suppress(Exception):  # a template may refuse in any way
                text = self.turns.template.render([{"role": "user", "content": "?"}, answer]).text
            found.append(text.rpartition(MARK)[2] if MARK in text else None)
        return found[0], found[1]

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """The token that ends an answer, and the one that ends a call; none where text does."""
        added = self.backend.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special} | {self.end_id}
        tail = self._tails[0]
        if tail is not None and not tail.strip() and self.end_id is not None:
            tail = self.ended("")  # _closed
        answer, call = self.token_ids([tail or "", self._tails[1] or ""])
        # Phi-3 goes on behind the end of an answer; </tool_call> is no end of a turn, and what follows is.
        ends = [id for id in answer if id in special] or [id for id in answer if id in added]
        return ends[:1], [id for id in call if id in special][-1:]

    @property
    def stops(self) -> list[int]:
        """Ids of the tokens that end a turn of the assistant's: generation has to stop there."""
        answer, call = self._ends
        return list(dict.fromkeys([*answer, *call]))

    def check_end(self) -> None:
        """RequestError where nobody could learn from the template when to stop."""
        tail = self._tails[0]
        if tail is None or self._ends[0]:
            return
        if end := tail.strip().partition("\n")[0]:
            what = f"ends an answer with {end!r}, which is no special token of the tokenizer: nothing would stop there"
            remedy = f"write data.add_tokens=['{end}'], or end it with {{{{ eos_token }}}} in a template of your own"
        else:
            what = "ends an answer with nothing, and the tokenizer has no end of text"
            remedy = "end it with a special token in a template of your own"
        raise RequestError(Problem(f"the chat template {what}", None, remedy))

    def prompt_differs(self, prompt: Sequence[Turn], answer: Sequence[Turn], tools: Sequence[Tool] = ()) -> bool:
        """Return True if the text before an answer differs from the generation prompt, as with templates that end a
        prompt with `<think>`."""
        if self._asks_alike or not answer:
            return False
        with suppress(Exception):  # who asks is told that the template refuses the prompt
            asked = self.turns.template.render(prompt, True, tools).text
            return not self.turns.template.render([*prompt, *answer], tools=tools).text.startswith(asked)
        return False

    @cached_property
    def _asks_alike(self) -> bool:
        """Whether each kind of answer begins where the template asks; then no row has to be looked at."""
        question: Turn = {"role": "user", "content": "?"}
        answers: list[Turn] = [
            {"role": "assistant", "content": MARK},
            {"role": "assistant", "content": MARK, "reasoning_content": MARK},
            {"role": "assistant", "content": "", "tool_calls": [CALL_OF_MARKS]},
        ]
        with suppress(Exception):  # a template may refuse in any way
            asked = self.turns.template.render([question], True).text
            for answer in answers:
                with suppress(Exception):
                    if not self.turns.template.render([question, answer]).text.startswith(asked):
                        return False
            return True
        return False

    def prompt_ids(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids [s] of a prompt, up to where the assistant is to speak; RequestError as `prompt_text`."""
        return self.token_ids([self.prompt_text(turns, tools)])[0]

    def message_ids(self, messages: Sequence[Message], ask: bool = True, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids [s] of turns in the template's form (`Template.messages`), of which nothing is checked;
        RequestError where the template refuses them."""
        with _refusals(messages):
            return self.token_ids([self.turns.template.render_messages(messages, ask, tools).text])[0]

    def prompt_text(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """A prompt as text, up to where the assistant is to speak; RequestError where something of it is not shown."""
        with _refusals(turns):
            return render_checked(self.turns.template, turns, [], tools)

    def conversation_text(self, prompt: Sequence[Turn], answer: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """A prompt with its answer as text; RequestError where something of them is not shown."""
        with _refusals([*prompt, *answer]):
            return self._closed(render_checked(self.turns.template, prompt, answer, tools), answer)

    def token_ids(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text; if `special`, with the tokenizer's own around them: a template has its own."""
        found = self.backend.encode_batch(list(texts), add_special_tokens=special)
        return [with_bos(encoding.ids, self.bos_id) for encoding in found]

    def ended(self, text: str) -> str:
        """The text with the token that ends one, as words."""
        end = self.special.get("eos_token", "")
        return text if text.endswith(end) else text + end

    def _ended(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> Encoded:
        """Plain text is learned whole, and that it ends."""
        framed = with_eos(ids, self.end_id)
        offsets = [*offsets[: len(framed)], *[(len(text), len(text))] * (len(framed) - len(offsets))]
        return Encoded(framed, list(framed), offsets, text)

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTokenizer:
        """Those of transformers' tokenizer; RequestError for one that has no tokenizer.json."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            what = f"{type(tokenizer).__name__} has no fast tokenizer"
            raise RequestError(Problem(what, "model.id", "use a model folder with a tokenizer.json"))
        template = tokenizer.chat_template
        own = template if isinstance(template, dict) else {"default": template}
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        default = own.get("default") or template_source(FALLBACK, adds_bos(tokenizer))
        return _kept(backend.to_str(), with_tool_template(default, own.get("tool_use")), tuple(special.items()))

    @classmethod
    def from_file(cls, file: Path, data: DataSpec) -> ChatTokenizer:
        """Those beside a model's `tokenizer.json`; RequestError for files that cannot be read."""
        names, special = _names(file)
        try:
            words = cls(file.read_text("utf-8"), "", special)
            adds = words.bos_id is not None and words.backend.encode("").ids[:1] == [words.bos_id]
            words._use(_template(file, data, names, adds))
            words.backend.add_special_tokens(list(data.add_tokens))
            return words
        except RequestError:
            raise
        except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
            raise RequestError(Problem(f"{file} is no tokenizer: {error}", "model.id", None)) from None


@lru_cache(maxsize=2)
def _kept(body: str, template: str, special: tuple[tuple[str, str], ...]) -> ChatTokenizer:
    """A run asks for the same one up to six times: to tokenise, for its stops, and for each measurement and save."""
    return ChatTokenizer(body, template, dict(special))


def with_bos(ids: Sequence[int], bos_id: int | None) -> list[int]:
    """The ids with BOS once in front, whoever wrote it: text, template and tokenizer may."""
    run = next((i for i, token in enumerate(ids) if token != bos_id), len(ids))
    return list(ids[max(0, run - 1) :])


def with_eos(ids: list[int], end_id: int | None) -> list[int]:
    """The ids with the end of text behind them, once; none where the tokenizer has none."""
    if end_id is None:
        return ids
    last = next((i for i, token in enumerate(reversed(ids)) if token != end_id), len(ids))
    return [*ids[: len(ids) - last], end_id]


@contextmanager
def _refusals(turns: Sequence[Any]) -> Iterator[None]:
    """A template may refuse a conversation in any way: a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(refused(turns, error)) from None


def template_of(file: Path | None, data: DataSpec) -> Template | None:
    """The chat template of `data`, or of a model with this `tokenizer.json`; None where neither is known here.

    RequestError for one that is no Jinja. Where the tokenizer is not here, its special tokens are empty.
    """
    if file is None:
        unknown = {"bos_token": "", "eos_token": ""}
        return Template(template_source(data.chat_template), unknown) if data.chat_template else None
    names, special = _names(file)
    return Template(_template(file, data, names), special)


def _names(file: Path) -> tuple[dict[str, object], dict[str, str]]:
    """The settings beside a tokenizer.json, and the special tokens in them."""
    names: Any = {}
    with suppress(OSError, ValueError):
        names = json_text.loads(file.with_name("tokenizer_config.json").read_text("utf-8"))
    if not isinstance(names, dict):
        names = {}
    return names, {key: _content(value) for key, value in names.items() if key.endswith("_token") and _content(value)}


def _content(token: object) -> str:
    return str(token.get("content") or "") if isinstance(token, dict) else token if isinstance(token, str) else ""


def adds_bos(tokenizer: Any) -> bool:
    """Return True if the tokenizer starts every text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template(file: Path, data: DataSpec, names: dict[str, Any], adds_bos: bool = False) -> str:
    """`data.chat_template`, or the tokenizer's own: beside it, in its settings, or ChatML."""
    if data.chat_template:
        return template_source(data.chat_template, adds_bos)
    own = names.get("chat_template")
    several = own if isinstance(own, list) else [{"name": "default", "template": own}]
    named = {str(one.get("name")): one.get("template") for one in several if isinstance(one, dict)}
    for name, place in (("default", "chat_template.jinja"), ("tool_use", "additional_chat_templates/tool_use.jinja")):
        if (beside := file.parent / place).is_file():
            named[name] = beside.read_text("utf-8")
    for name, source in named.items():
        if source is not None and not isinstance(source, str):
            what = f"the chat template {name} in tokenizer_config.json is {kind_of(source)}, not text"
            raise RequestError(Problem(what, str(file.parent), "set data.chat_template to a Jinja file"))
    return with_tool_template(named.get("default") or template_source(FALLBACK, adds_bos), named.get("tool_use"))
