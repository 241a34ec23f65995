"""Aliases of columns, and the rule for columns that no format reads.

A column is read, or it is left out and that is said. One that looks like content, by its name and by holding text, is
not left out unless the row says the same elsewhere: it is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from runner.data.examples import Example, Learnable, Preference, Turn, UnpairedExample
from runner.data.readers.files import Row
from runner.data.row_values import CONTENT_KEYS, THOUGHTS, RowReader
from runner.spec import DataSpec

PROMPTS = ("question", "query", "problem", "input")
"""What a prompt is called where there is no `data.prompt_field`, in the order they are looked for."""
SYSTEMS = ("system_prompt",)
ANSWERS = ("response", "output", "solution", "answer")
"""The same for an answer: a long solution goes before the short answer that it ends with."""

_ASKING = {*PROMPTS, "prompt", "prompts", "instruction", "instructions", "inputs", "user", "human", "user_prompt",
           "user_message"}  # fmt: skip
_ABOUT = {
    "context", "contexts", "background", "passage", "passages", "paragraph", "paragraphs", "document", "documents",
    "article", "articles", "story", "premise", "hypothesis", "choices", "options", "role",
}  # fmt: skip
_HISTORY = {"history", "chat_history"}
_SYSTEM = {
    "system", "system_prompt", "system_message", "system_msg", "system_instruction", "system_instructions",
    "system_text", "system_content", "sys", "sys_prompt", "sys_msg", "developer",
}  # fmt: skip
_ANSWERING = {
    "completion", "response", "answer", "answers", "output", "outputs", "target", "reply", "solution", "chosen",
    "rejected", "assistant", "responses", "completions", "targets", "summary", "highlights",
}  # fmt: skip
_THINKING = {
    *THOUGHTS, "thought", "thoughts", "cot", "complex_cot", "chain_of_thought", "rationale", "explanation", "think",
}  # fmt: skip
_REMARKS = {"rationale", "explanation"}
"""Beside a pair of answers, why one of them is better."""
_TALKING = {"messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "trajectory"}
_TOOLS = {"tools", "functions"}

_KEYS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    (_SYSTEM, ("system_field",)),
    (_TOOLS, ("tools_field",)),
    (_THINKING, ("thinking_field",)),
    (_HISTORY, ("history_field",)),
    (_ABOUT, ("input_field",)),
    (_ASKING, ("prompt_field", "input_field")),
    (_ANSWERING, ("completion_field", "output_field")),
    (_TALKING, ("messages_field", "prompt_field")),
)
"""Kinds of content, and the keys of `DataSpec` that may read them."""


def _plain(name: str) -> str:
    """The name as the sets above have it: `Complex CoT` → `complex_cot`, `user_query` → `query`."""
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    role, _, rest = plain.partition("_")
    return rest if role in _SPEAKERS and plain not in _CONTENT and rest in _CONTENT else plain


def is_fact(name: str) -> bool:
    """Return True if the name of a column suggests metadata, such as `chosen_model` or `Source`."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not _FACTS.isdisjoint(words)


def is_content(name: str) -> bool:
    """Return True if the name of a column suggests content."""
    return _plain(name) in _CONTENT


def seen(row: Row, spec: DataSpec) -> Row:
    """The row without the numbers of rows and `data.ignore_columns`."""
    hidden = {name for name in row if is_index(name)} | {*spec.ignore_columns}
    return row if hidden.isdisjoint(row) else {name: value for name, value in row.items() if name not in hidden}


def is_index(name: str) -> bool:
    """pandas' name for the numbers of the rows, in CSV, when read again, and in Parquet."""
    return name in ("", "__index_level_0__") or name.startswith("Unnamed: ")


def is_odd(name: str, value: object) -> bool:
    """Return True if a column is named like a prompt, an answer or turns, but holds neither text nor a list."""
    return _plain(str(name)) in _ASKING | _ANSWERING | _TALKING and not isinstance(value, (str, list, type(None)))


def unread(reader: RowReader, found: Learnable) -> list[str]:
    """Columns that look like content, were not read, and say what no other column does.

    Beside judged answers plain text may be their prompt; otherwise it is the less exact form of what was read.
    """
    content = _CONTENT | {"text"} if isinstance(found, (Preference, UnpairedExample)) else _CONTENT
    content = content - _REMARKS if isinstance(found, Preference) else content
    left = [
        name
        for name, value in reader.row.items()
        if name not in reader.read
        and isinstance(value, (str, list, dict))
        and (key := _plain(str(name))) in content
        and any(text.strip() not in _NOTHING for text in _texts(value))
        and not _said(key, value, found)
    ]
    if left or not isinstance(found, Preference) or not isinstance(found.prompt, str):
        return left
    return [name for name in perhaps_prompts(reader) if not _said("answer", reader.row[name], found)]


def media(reader: RowReader) -> list[str]:
    """Columns with pictures or sounds: whatever is said of them could not be learned without."""
    return [str(name) for name, value in reader.row.items() if _plain(str(name)) in _MEDIA and value]


def perhaps_prompts(reader: RowReader) -> list[str]:
    """Columns that may be the prompt of answers that have none, whatever they are called: other text, or turns."""
    return [
        str(name)
        for name, value in reader.row.items()
        if name not in reader.read
        and not is_fact(str(name))
        and (isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, dict) for part in value)))
        and any(text.strip() not in _NOTHING for text in _texts(value))
    ]


_NOTHING = ("", "[]", "{}", "null")  # as CSV and JSON text have it
_MEDIA = {"image", "images", "picture", "pictures", "video", "videos", "audio", "audios"}
_SPEAKERS = {"user", "human", "assistant", "bot", "model", "ai", "gpt", "llm"}
_FACTS = {
    "id", "ids", "uid", "uuid", "hash", "key", "index", "source", "src", "dataset", "subset", "split", "origin", "url",
    "link", "path", "file", "filename", "model", "models", "generator", "author", "annotator", "name", "type", "kind",
    "category", "categories", "class", "label", "labels", "tag", "tags", "topic", "topics", "task", "domain",
    "subject", "language", "lang", "locale", "license", "date", "time", "timestamp", "version", "score", "scores",
    "rating", "ratings", "rank", "difficulty", "level", "quality", "metadata", "meta", "info", "status", "rationale",
    "explanation", "reason", "critique", "feedback", "chosen", "rejected", "preference", "judge", "judgement",
    "judgment",
}  # fmt: skip
"""Words in the names of columns that say something about a row."""
_CONTENT = set[str]().union(*(names for names, _ in _KEYS))


def mappings(name: str, prompt: str, text: str) -> list[dict[str, str]]:
    """Keys of `DataSpec` that may make the column read, beside a column with the prompt or with plain text."""
    plain = _plain(name)
    if plain in _MEDIA:
        return []
    keys = next((keys for names, keys in _KEYS if plain in names), ())
    found = [{key: name} for key in keys]
    if plain in _ASKING | _ABOUT:  # as Alpaca's input behind its instruction
        found.append({"instruction_field": prompt, "input_field": name})
    if plain in _HISTORY:
        found.append({"instruction_field": prompt, "history_field": name})
    if plain in _ANSWERING:  # an article with its summary
        found.append({"prompt_field": text, "completion_field": name})
    return [*found, {"completion_field": text}] if plain in _ASKING else found or [{"prompt_field": name}]


def listing(names: Sequence[str]) -> str:
    """Names as a list of Hydra's, quoted for a shell where they have to be."""
    if all(re.fullmatch(r"\w+", name) for name in names):
        return f"[{','.join(names)}]"
    return f"'[{','.join(json.dumps(name, ensure_ascii=False) for name in names)}]'"


def _texts(value: object) -> Iterator[str]:
    """Every text in a value; of turns what they say."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        said = next((value[key] for key in CONTENT_KEYS if key in value), None)
        yield from _texts(list(value.values()) if said is None else said)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _said(key: str, value: object, found: Learnable) -> bool:
    """The value is in what was read, where such a value belongs; or it is the whole of that, rendered as a prompt."""
    given, answered = _contents(found)
    if (
        key in ("prompt", "text")
        and isinstance(value, str)
        and all(part in value for text in (*given, *answered) for part in text.split("\n\n"))
    ):
        return True
    places = answered if key in _ANSWERING | _THINKING else [*given, *answered] if key in _TALKING else given
    return all(any(text.strip() in place for place in places) for text in _texts(value))


def _contents(found: Learnable) -> tuple[list[str], list[str]]:
    """What is given and what the assistant says."""
    if isinstance(found, Preference) and isinstance(found.prompt, str):
        return [found.prompt], [f"{found.prompt}{found.chosen}", f"{found.prompt}{found.rejected}"]
    turns: list[Turn] = [*found.prompt] if not isinstance(found.prompt, str) else []
    for part in ("completion", "chosen", "rejected"):
        turns += getattr(found, part, [])
    given = [turn["content"] for turn in turns if turn["role"] != "assistant"]
    answered = [turn[key] for turn in turns if turn["role"] == "assistant" for key in _SAYS if turn.get(key)]  # type: ignore[literal-required]  # _SAYS
    if isinstance(found, Example) and found.text is not None:
        given.append(found.text)
        answered.append(found.text)
    return given, answered


_SAYS = ("content", "reasoning_content")
