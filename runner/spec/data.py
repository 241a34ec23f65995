"""`data=`: where the examples come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from runner.spec.part import OwnCode, Part, is_own

Format = Literal[
    "auto", "chat", "alpaca", "prompt_completion", "text", "preference", "unpaired", "prompts", "tokens"
]  # fmt: skip
SIZES = ("num_rows", "num_eval_rows", "tokens_per_row", "bytes_per_row")
"""Keys that say how much a data set on the Hub holds."""


class SourceSpec(Part):
    """One of several sources that are mixed; what it leaves out is as in `data`."""

    path: str
    """File, folder, glob or URL."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn from, relative to the others, where `data.mix` is not `concat`."""
    max_examples: int | None = Field(default=None, ge=1)
    """Take only its first n rows."""
    format: Format | OwnCode | None = None
    """Row format; null means `data.format`."""
    fields: dict[str, str] = {}
    """Its own field names, by the keys of `data` without `_field`: `{prompt: question, completion: answer}`."""


class DataSpec(Part):
    """The rows, and the names of their fields."""

    name: str = "file"
    """Name of the choice, as in `data=commands`."""
    source: Literal["commands", "pydoc", "file", "hub"] = "file"
    """The bundled generator, Python's own reference pages, local files, or a data set on the Hugging Face Hub."""
    path: str | None = None
    """File (JSON, JSONL, CSV, TSV, Parquet, text; .gz, .bz2, .xz, .zst), folder, glob or URL (`s3://`, `gs://`, whatever fsspec reads) for `source=file`; relative to the working directory."""
    sources: list[SourceSpec] = []
    """Several sources for `source=file`, mixed by `mix`; instead of `path`."""
    mix: Literal["concat", "weights", "until_exhausted"] = "concat"
    """How sources are mixed: one after the other; by weight with the rarest repeated until all are used; or by weight until the first one has no rows left."""
    eval_path: str | None = None
    """File with held-out rows; null means `eval_fraction` of the rows is held out."""
    id: str | None = None
    """Hub id of the data set for `source=hub`."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the Hub."""
    subset: str | None = None
    """Configuration of the data set on the Hub."""
    split: str = "train"
    """Split of the data set on the Hub."""
    eval_split: str | None = None
    """Split with held-out rows; null means `eval_fraction` of the rows is held out."""
    num_rows: int | None = Field(default=None, ge=1)
    """Rows of `split` by the data set's card, for planning time and cost before the download. Set in the files of `conf/data/`; for `data=hub` by you."""
    num_eval_rows: int | None = Field(default=None, ge=1)
    """Rows of `eval_split` by the card."""
    tokens_per_row: float | None = Field(default=None, gt=0)
    """Mean tokens of a row, where the card or you have counted them."""
    bytes_per_row: float | None = Field(default=None, gt=0)
    """Mean bytes of a row's text by the card: `num_bytes / num_examples`. Without `tokens_per_row`, tokens are estimated from it."""
    streaming: bool = False
    """Read the first `max_examples` rows from the Hub without downloading the whole data set."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows held out if no separate file or split is named."""
    max_examples: int | None = Field(default=None, ge=1)
    """Take only the first n training rows."""
    max_eval_examples: int | None = Field(default=None, ge=1)
    """Take only the first n held-out rows; a large set slows down every evaluation."""
    format: Format | OwnCode = "auto"
    """Row format; auto looks at the fields of the first row. docs/data.md shows each; `FILE.py:CLASS` is one of your own, derived from `RowFormat` of `runner.data.user_formats`."""
    messages_field: str = "messages"
    """Field with the list of `{role, content}` turns; auto takes `conversations` (ShareGPT) too."""
    prompt_field: str = "prompt"
    """Field with the prompt: text, or turns."""
    completion_field: str = "completion"
    """Field with the answer: text, or turns; auto takes `response`, `output`, `solution` and `answer` too."""
    text_field: str = "text"
    """Field with plain text."""
    instruction_field: str = "instruction"
    """Alpaca: field with the task."""
    input_field: str = "input"
    """Alpaca: field with the input of the task; may be empty or missing."""
    output_field: str = "output"
    """Alpaca: field with the answer."""
    history_field: str = "history"
    """Alpaca: field with earlier `[question, answer]` pairs; it may be missing."""
    system_field: str = "system"
    """Field with a row's own system prompt; it may be missing. `system_prompt` is taken, too."""
    thinking_field: str = "thinking"
    """Field with the reasoning of a single answer (prompt_completion, alpaca); may be missing. auto also takes `reasoning` and `reasoning_content`."""
    tools_field: str = "tools"
    """Field with the tools (JSON schemas, as a list or as JSON text) that a conversation may call; it may be missing."""
    chosen_field: str = "chosen"
    """Preferences: field with the better answer."""
    rejected_field: str = "rejected"
    """Preferences: field with the worse answer."""
    label_field: str = "label"
    """Unpaired preferences: field that says whether the answer is good: true or false, 1 or 0."""
    answer_field: str = "answer"
    """Prompts: field with the answer that a reward function compares with."""
    ids_field: str = "input_ids"
    """Already tokenised: field with the token ids; `labels` beside it are taken as they are."""
    weight_field: str = "weight"
    """Key of a turn with its weight: 0 or false excludes the turn from the loss, 1 or true includes it (the default for assistant turns)."""
    ignore_columns: list[str] = []
    """Columns to ignore although they look like content (`answer`, `context`, `reasoning`, …)."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """Other names of roles: `{Frage: user, Antwort: assistant}`."""
    on_error: Literal["stop", "skip"] = "stop"
    """Handling of wrong rows: stop lists all of them, skip leaves them out and reports their number."""
    on_long: Literal["truncate", "drop", "split"] = "truncate"
    """Handling of rows longer than `train.max_length`: cut the end, leave them out, or continue in another row. Their number is reported."""
    system_prompt: str | None = None
    """System turn put before every conversation that has none."""
    chat_template: str | None = None
    """Jinja file with a chat template, or a name from conf/chat_template; null means the tokenizer's own, or ChatML if it has none."""
    add_tokens: list[str] = []
    """Special tokens to add to the tokenizer; the embedding grows with them, and they are trained and saved with the model."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that read and tokenise; null means one per core, or one for few rows."""

    @property
    def own_formats(self) -> dict[str, str]:
        """Row formats of the user's own, `FILE.py:CLASS`, by the keys that name them."""
        found = {"data.format": self.format}
        found |= {f"data.sources.{number}.format": one.format or "" for number, one in enumerate(self.sources)}
        return {key: name for key, name in found.items() if is_own(name)}

    @model_validator(mode="after")
    def _source_has_its_key(self) -> DataSpec:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.source != "file" and (self.path or self.sources):
            yield f"data.path names a file, and data={self.name} takes its rows from elsewhere; write data=file"
        if self.source == "file" and self.path and self.sources:
            yield "data.path and data.sources are both given; name one of them"
        if self.source == "file" and not self.path and not self.sources:
            yield "data.path is missing; name a file, such as data.path=my.jsonl"
        if self.source == "hub" and not self.id:
            yield "data.id is missing; name a data set, such as data.id=org/name"
        for key in ("id", "revision", "subset", "split", "eval_split"):
            if self.source != "hub" and getattr(self, key) != type(self).model_fields[key].default:
                what = f"data.{key}={getattr(self, key)} is of a data set on the Hub, and data={self.name} is none"
                yield f"{what}; write data=hub data.id=org/name, or leave it out"
        if self.eval_path and self.source != "file":
            instead = "write data.eval_split=test, say" if self.source == "hub" else "write data.eval_fraction=0.1, say"
            yield f"data.eval_path={self.eval_path} is for data=file, and not for data={self.name}; {instead}"
        for one in self.sources:
            if one.fields and is_own(one.format or self.format):
                yield f"data.sources: {one.path} names fields, and a format of your own reads the columns itself; leave fields out"
        if self.source in ("commands", "pydoc") and is_own(self.format):
            yield f"data.format={self.format} is for rows of your own, and data={self.name} comes with its rows; leave it out"
        if self.mix != "concat" and not self.sources:
            yield f"data.mix={self.mix} mixes data.sources, and there are none; leave it out"
        if self.streaming and not (self.source == "hub" and self.max_examples):
            yield "data.streaming takes the first rows of a data set on the Hub; say how many with data.max_examples"
