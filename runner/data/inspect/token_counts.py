"""Token counts of rows, by the model's tokenizer where it is on this machine, else by characters."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.data.chat_template import Template
from runner.data.chat_tokenizer import template_of
from runner.data.examples import Example, Learnable, Preference, PromptExample, Turn
from runner.errors import RequestError
from runner.paths import cache_dir
from runner.spec import DataSpec, ModelSpec

# "1 token ~= 4 chars in English" (help.openai.com, article 4936856).
CHARS_PER_TOKEN = 4.0
# Names, figures and key=value take more: 2.41 in the questions and 2.36 in the answers of the commands data, counted
# with SmolLM2's tokenizer (49,152 tokens); at 2.42 the rows pack into as many sequences as they really do, 168. That
# tokenizer is not read from the model's package, which holds one GGUF file: 42 ms to parse its 98,052 strings, 48 to
# build the merges, 80 to render and encode 600 rows, of half a second.
COMMANDS_CHARS_PER_TOKEN = 2.42
# ChatML puts <|im_start|>, role, line break, <|im_end|> and line break around each turn; other templates about as much.
TEMPLATE_TOKENS_PER_TURN = 5


class TokenCounter:
    """Counts rows of one data set for one model; remembers whether all that it counted was exact."""

    def __init__(self, data: DataSpec, file: Path | None) -> None:
        """`file` is the model's `tokenizer.json`; None where it is not on this machine."""
        self._data = data
        self._encoder = _encoder(file)
        self._template = _template(file, data) if self._encoder is not None else None
        self.exact = self._encoder is not None

    @property
    def how(self) -> str:
        """How the tokens were counted, in a few words."""
        if self._encoder is not None:
            return "counted with the model's tokenizer" + ("" if self.exact else ", its template estimated")
        rate = f"{_rate(self._data):g} characters a token assumed"
        return f"{rate}: the tokenizer is not on this machine"

    def rows(self, rows: Sequence[Learnable]) -> list[int]:
        """Tokens of each row: prompt, answer (the longer of two) and what the template puts around them."""
        examples = [_as_example(row) for row in rows]
        if self._encoder is None:
            return [len(example.ids) if example.ids else self._estimated(example) for example in examples]
        if any(example.ids for example in examples):  # it came tokenised
            return [len(example.ids or []) for example in examples]
        texts = [_text(example, self._template) for example in examples]
        self.exact = self.exact and all(extra == 0 for _, extra in texts)
        return [count + extra for count, (_, extra) in zip(self._encoded([t for t, _ in texts]), texts, strict=True)]

    def answers(self, rows: Sequence[Learnable]) -> list[int]:
        """Tokens of each answer, with the one that ends it; none for plain text, which asks nothing."""
        examples = [_as_example(row) for row in rows]
        texts = ["".join(turn["content"] for turn in example.completion) for example in examples if example.completion]
        if self._encoder is None:
            return [1 + round(len(text) / _rate(self._data)) for text in texts]
        return [1 + count for count in self._encoded(texts)]

    def _encoded(self, texts: list[str]) -> list[int]:
        return [len(one.ids) for one in self._encoder.encode_batch(texts, add_special_tokens=False)]

    def _estimated(self, example: Example) -> int:
        if example.text is not None:
            return 1 + max(1, round(len(example.text) / CHARS_PER_TOKEN))  # the end of the text
        turns = (*example.prompt, *example.completion)
        return max(1, sum(self._of_turn(turn) for turn in turns)) + TEMPLATE_TOKENS_PER_TURN * len(turns)

    def _of_turn(self, turn: Turn) -> int:
        rate = CHARS_PER_TOKEN if turn["role"] == "system" else _rate(self._data)  # a system prompt is prose
        return round(len(turn["content"]) / rate)


def _as_example(row: Learnable) -> Example:
    """What has to be computed at once of any kind of row."""
    if isinstance(row, Example):
        return row
    if isinstance(row, PromptExample):
        return Example(row.prompt, tools=row.tools)
    if not isinstance(row, Preference):
        return Example(row.prompt, row.completion, tools=row.tools)
    if isinstance(row.prompt, str):
        return Example(text=row.prompt + max(str(row.chosen), str(row.rejected), key=len))
    answers = [answer for answer in (row.chosen, row.rejected) if not isinstance(answer, str)]
    longest = max(answers, key=lambda turns: sum(len(turn["content"]) for turn in turns))
    return Example(row.prompt, longest, tools=row.tools)


def _rate(data: DataSpec) -> float:
    return COMMANDS_CHARS_PER_TOKEN if data.source == "commands" else CHARS_PER_TOKEN


def _encoder(file: Path | None) -> Any:
    try:  # 7 ms, and SmolLM2's file takes 75 ms to load
        return importlib.import_module("tokenizers").Tokenizer.from_file(str(file)) if file else None
    except Exception:  # tokenizers raises a bare Exception for a file that it cannot read
        return None


def _text(example: Example, template: Template | None) -> tuple[str, int]:
    """The text of an example, and the tokens to add for what stands around it."""
    if example.text is not None:
        return example.text, 1  # the end of the text
    turns = [*example.prompt, *example.completion]
    if template is not None:
        with suppress(Exception):  # a template may refuse a conversation in any way
            return template.render(turns, tools=example.tools).text, 0
    return "".join(turn["content"] for turn in turns), TEMPLATE_TOKENS_PER_TURN * len(turns)


def _template(file: Path | None, data: DataSpec) -> Template | None:
    """The chat template; None where it is not here, or cannot be read."""
    with suppress(RequestError):
        return template_of(file, data) if file else None
    return None


def tokenizer_file(model: ModelSpec) -> Path | None:
    """The model's `tokenizer.json`, if it is on this machine: in its folder, our cache or the Hub's cache."""
    if model.package or model.gguf_file:
        return _unpacked(model)
    folder = Path(model.id).expanduser()
    if not folder.is_dir():
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.id.replace('/', '--')}"
        commit = model.revision or "main"
        with suppress(OSError):
            commit = (hub / "refs" / commit).read_text("utf-8").strip()
        folder = hub / "snapshots" / commit
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


def _unpacked(model: ModelSpec) -> Path | None:
    """Of a model that was unpacked from GGUF; the folder's name is `runner.train.model_loading.source_of`'s."""
    with suppress(ImportError, OSError, ValueError):
        found = importlib.util.find_spec(model.package) if model.package else None
        folder = Path(found.origin).parent if found and found.origin else Path(model.id).expanduser()
        gguf = folder / str(model.gguf_file)
        stat = gguf.stat()
        file = cache_dir() / "models" / f"{gguf.stem}-{stat.st_size}-{int(stat.st_mtime)}" / "tokenizer.json"
        return file if file.is_file() else None
    return None
