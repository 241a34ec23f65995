"""A tokenizer with its chat template, without transformers: rows → token ids and labels.

Small enough to be sent to the processes that tokenise, and loaded in a moment for a preview.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.data.examples import Example, Turn
from runner.data.masks import IGNORED, Turns, labels_of, learned
from runner.data.templates import Rendered, Template, named, template_source
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


class Words:
    """Renders and tokenises; what transformers' fast tokenizer of the same files does."""

    def __init__(self, body: str, template: str, special: dict[str, str]) -> None:
        """`body` is the content of tokenizer.json, `template` Jinja, `special` the special tokens by their names."""
        self.state = (body, template, special)
        backend = import_module("tokenizers").Tokenizer.from_str(body)  # 75 ms for SmolLM2's
        backend.no_truncation()
        backend.no_padding()
        self.backend: Any = backend
        self.turns = Turns(Template(template, special))
        end = special.get("eos_token")
        self.end_id: int | None = backend.token_to_id(end) if end else None

    def __reduce__(self) -> tuple[type[Words], tuple[str, str, dict[str, str]]]:
        return type(self), self.state

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
                text, spans = texts[index]
                ids, offsets = list(encoding.ids), list(encoding.offsets)
                if special:
                    found[index] = self._ended(ids, offsets, text)
                else:
                    found[index] = Encoded(ids, labels_of(ids, offsets, spans), offsets, text)
        for index, example in enumerate(examples):
            if example.ids is not None:
                found[index] = Encoded(example.ids, example.labels or list(example.ids), [], "")
        return [found[index] for index in range(len(examples))]

    def _prepared(self, example: Example, loss_on: str) -> tuple[str, list[tuple[int, int]]]:
        """The text to tokenise and the spans of it to learn."""
        if example.ids is not None:
            return "", []
        if example.text is not None:
            return example.text, []
        with _refusals():
            shown = self.turns.template.render([*example.prompt, *example.completion], tools=example.tools)
            return shown.text, learned(example, loss_on, shown.text, shown.marks, self.turns)

    def rendered(self, turns: Sequence[Turn], ask: bool = False, tools: Sequence[dict[str, Any]] = ()) -> Rendered:
        """A conversation as text; `ask` ends it where the assistant is to speak. RequestError where it is refused."""
        with _refusals():
            return self.turns.template.render(turns, ask, tools)

    def ids(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text; if `special`, with the tokenizer's own around them: a template has its own."""
        return [list(found.ids) for found in self.backend.encode_batch(list(texts), add_special_tokens=special)]

    def ended(self, text: str) -> str:
        """The text with the token that ends one, as words."""
        end = self.state[2].get("eos_token", "")
        return text if text.endswith(end) else text + end

    def _ended(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> Encoded:
        """Plain text is learned whole, and that it ends."""
        if self.end_id is not None and (not ids or ids[-1] != self.end_id):
            ids.append(self.end_id)
            offsets.append((len(text), len(text)))
        return Encoded(ids, list(ids), offsets, text)

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        """Those of transformers' tokenizer; RequestError for one that has no tokenizer.json."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            what = f"{type(tokenizer).__name__} has no fast tokenizer"
            raise RequestError(Problem(what, "model.id", "use a model folder with a tokenizer.json"))
        template = tokenizer.chat_template
        source = template.get("default") if isinstance(template, dict) else template
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return cls(backend.to_str(), source or template_source(FALLBACK), special)

    @classmethod
    def from_file(cls, file: Path, data: DataSpec) -> Words:
        """Those beside a model's `tokenizer.json`; RequestError for files that cannot be read."""
        names, special = _names(file)
        try:
            words = cls(file.read_text("utf-8"), _template(file, data, names), special)
            words.backend.add_special_tokens(list(data.add_tokens))
            return words
        except RequestError:
            raise
        except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
            raise RequestError(Problem(f"{file} is no tokenizer: {error}", "model.id", None)) from None


@contextmanager
def _refusals() -> Iterator[None]:
    """A template may refuse a conversation in any way: a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        remedy = "set data.chat_template to a Jinja file, or data.system_prompt=null"
        what = f"the model's chat template refuses a conversation: {error}"
        raise RequestError(Problem(what, None, remedy)) from None


def template_of(file: Path | None, data: DataSpec) -> Template | None:
    """The chat template of `data`, or of a model with this `tokenizer.json`; None where neither is known here.

    RequestError for one that is no Jinja.
    """
    if file is None:
        return Template(template_source(data.chat_template), {}) if data.chat_template else None
    names, special = _names(file)
    return Template(_template(file, data, names), special)


def _names(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings beside a tokenizer.json, and the special tokens in them."""
    names: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        names = json.loads(file.with_name("tokenizer_config.json").read_text("utf-8"))
    return names, {key: _content(value) for key, value in names.items() if key.endswith("_token") and _content(value)}


def _content(token: Any) -> str:
    return str(token.get("content") or "") if isinstance(token, dict) else token if isinstance(token, str) else ""


def _template(file: Path, data: DataSpec, names: dict[str, Any]) -> str:
    """`data.chat_template`, or the tokenizer's own: beside it, in its settings, or ChatML."""
    if data.chat_template:
        return template_source(data.chat_template)
    if (beside := file.with_name("chat_template.jinja")).is_file():
        return beside.read_text("utf-8")
    own = names.get("chat_template")
    if isinstance(own, list):  # several, by name
        own = next((one["template"] for one in own if one.get("name") == "default"), None)
    return own if isinstance(own, str) else named()[FALLBACK].read_text("utf-8")


__all__ = ["FALLBACK", "IGNORED", "Encoded", "Words"]
