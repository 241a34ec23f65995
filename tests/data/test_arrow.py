"""Rows out of Parquet and the Hub say what was written: nulls that Arrow fills in are nobody's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Json, List
from pyarrow import parquet

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import PromptExample
from runner.data.inspect.sample import sample
from runner.data.load import canonical_rows
from runner.data.readers.arrow import rows_of
from runner.data.readers.files import read_table
from runner.data.readers.hub import load_hub
from runner.data.readers.streams import tables
from runner.data.row_store import Stored
from runner.errors import RequestError
from tests.conftest import spec_of
from tests.data.test_loss_mask import OF_TRL, SPECIAL, body, learned_pieces

__all__ = ["body"]  # a fixture


def called(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


CITY = {"type": "string", "enum": ["Oslo", "Rome"]}
ZONE = {"type": "string", "default": "+1"}
ARGUMENTS: list[dict[str, Any]] = [
    {"city": "Oslo"},
    {"zone": "+1", "fmt": "24h"},
    {},
    {"where": [{"city": "Rome"}, {"zone": "+2"}], "deep": {"city": "Bern"}},
]
ROWS = [
    {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [called("look", one)]}],
        "tools": [tool("look", {"city": CITY} if number % 2 else {"zone": ZONE})],
    }
    for number, one in enumerate(ARGUMENTS)
]


def arguments_of(rows: list[Any]) -> list[Any]:
    return [row.completion[0]["tool_calls"][0]["function"]["arguments"] for row in rows]


def check(rows: list[Any]) -> None:
    assert arguments_of(rows) == ARGUMENTS
    assert [row.tools for row in rows] == [row["tools"] for row in ROWS]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrow") / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    filled = parquet.read_table(path).to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled["city"] == "Oslo" and filled["zone"] is None  # what Arrow makes of it
    return path


def test_nulls_that_arrow_invents_are_in_no_row_however_a_file_is_read(file: Path) -> None:
    data = spec_of("data=file", f"data.path={file}").data
    for table in (read_table(str(file)), next(tables(str(file)))):
        rows, problems = canonical_rows(table, data)
        assert problems == []
        check(rows)
        check(list(Stored.of(rows, "sft")))
    check(sample(data).examples)


@pytest.mark.parametrize("more", [[], ["data.streaming=true", "data.max_examples=100"]])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_neither_are_they_in_rows_of_the_hub(file: Path, tmp_path: Path, kind: str, more: list[str]) -> None:
    folder = file.parent
    if kind == "jsonl":
        folder = tmp_path
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    data = spec_of("data=hub", f"data.id={folder}", *more).data
    rows, problems = canonical_rows(load_hub(data)[0], data)
    assert problems == []
    check(rows)


def test_the_call_that_is_learned_has_the_arguments_that_were_written(file: Path, body: str) -> None:
    rows, _ = canonical_rows(read_table(str(file)), spec_of("data=file", f"data.path={file}").data)
    words = ChatTokenizer(body, (OF_TRL / "qwen2_5.jinja").read_text("utf-8"), SPECIAL)
    encoded = words.encode(rows[1], "auto")
    (piece,) = learned_pieces(words, encoded)
    assert piece == '<tool_call>\n{"name": "look", "arguments": {"zone": "+1", "fmt": "24h"}}\n</tool_call><|im_end|>'
    assert "null" not in encoded.text


@pytest.mark.parametrize("as_turns", [True, False])
def test_nulls_that_somebody_wrote_stay_where_they_can_be_told(tmp_path: Path, as_turns: bool) -> None:
    """In JSON: lines of it, text in a column, arguments as text, and the JSON type that `datasets` writes."""
    exact = {"city": None, "n": [None, 1], "deep": {"a": None}}
    call = called("look", exact if as_turns else json.dumps(exact))
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    other = {"messages": [*row["messages"][:1], {"role": "assistant", "tool_calls": [called("look", {"z": 1})]}]}
    lines, text, typed = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.parquet"
    lines.write_text(json.dumps(row) + "\n", "utf-8")
    parquet.write_table(pa.table({"messages": [json.dumps(row["messages"])]}), text)
    features = Features({"messages": List(Json())})
    Dataset.from_list([row, other], features=features).to_parquet(str(typed))
    for path in (lines, text, typed):
        for table in (read_table(str(path)), next(tables(str(path)))):
            rows, problems = canonical_rows(table, spec_of("data=file", f"data.path={path}").data)
            assert problems == [] and arguments_of(rows)[0] == exact


def test_a_map_is_an_object_and_a_column_keeps_its_null(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    columns = {"label": pa.array([None, 1]), "facts": pa.array([[("a", "1")], [("b", None)]], kind)}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = read_table(str(tmp_path / "a.parquet")).rows
    assert rows == [{"label": None, "facts": {"a": "1"}}, {"label": 1, "facts": {"b": None}}]


def test_a_list_that_is_a_view_has_no_invented_nulls_either() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "bob"}]
    kind = pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})
    for view in (pa.list_view(kind), pa.large_list_view(kind)):
        assert rows_of(pa.table({"messages": pa.array([turns], view)})) == [{"messages": turns}]


def test_prompts_of_grpo_come_back_without_them(tmp_path: Path, body: str) -> None:
    turns = [[*row["messages"], {"role": "tool", "content": "4"}] for row in ROWS]
    parquet.write_table(pa.Table.from_pylist([{"prompt": one, "answer": "4"} for one in turns]), tmp_path / "p.parquet")
    words = ["objective=grpo", "objective.rewards=[exact_match]", "data=file", f"data.path={tmp_path / 'p.parquet'}"]
    spec = spec_of("method=lora", *words)
    rows, problems = canonical_rows(read_table(str(tmp_path / "p.parquet")), spec.data, "prompts")
    assert problems == [] and all(isinstance(row, PromptExample) for row in rows)
    asked = [row.prompt[1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert asked == ARGUMENTS


def test_a_key_that_stands_twice_in_arrows_json_or_map_is_refused(tmp_path: Path) -> None:
    typed = pa.array(['{"x": 1, "x": 2}'], pa.json_())
    mapped = pa.array([[("x", 1), ("x", 2)]], pa.map_(pa.string(), pa.int64()))
    for name, column, said in (
        ("a", typed, "the key 'x' occurs twice in one object"),
        ("b", mapped, "a key occurs twice"),
    ):
        parquet.write_table(pa.table({"text": ["a"], "more": column}), file := tmp_path / f"{name}.parquet")
        for read in (lambda file=file: read_table(str(file)), lambda file=file: list(tables(str(file)))):
            with pytest.raises(RequestError) as caught:
                read()
            (problem,) = caught.value.problems
            assert said in problem.what and problem.source == str(file)
