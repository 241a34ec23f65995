"""Data as people have it: every format, every odd row, and all mistakes told at once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from runner.data import commands_dataset
from runner.data.examples import Example, fingerprint
from runner.data.load import load_examples, split
from runner.data.readers import hub
from runner.data.readers.files import read_table
from runner.data.readers.streams import tables
from runner.data.row_formats import detect_format
from runner.errors import RequestError
from runner.paths import ASSETS
from runner.spec import DataSpec
from tests.support.rows import canonical_row, read_rows
from tests.support.rows import data_spec as spec

ROWS = [
    {"prompt": "What is 2 + 2?", "completion": "4"},
    {"prompt": 'Say "hi",\nthen stop.', "completion": "hi\u2028there"},
    {"prompt": "Grüße, 世界 🌍", "completion": "ça va; très bien"},
]


def as_bytes(ending: str) -> bytes:
    if ending == "parquet":
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
        return buffer.getvalue()
    if ending == "json":
        return json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    if ending in ("jsonl", "ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter="\t" if ending == "tsv" else ",")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def wrong(tmp_path: Path, name: str, content: str | bytes, **changes: Any) -> list[str]:
    """What `load` says about a file: `place: what (remedy)` of each problem."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError) as caught:
        load_examples(spec(path=str(file), **changes), seed=0)
    assert caught.value.exit_code == 2
    told = [f"{p.source or ''}: {p.what} ({p.remedy})" for p in caught.value.problems]
    return [line.replace(f"{tmp_path}/", "") for line in told]


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str, zipped: bool) -> None:
    data = as_bytes(ending)
    file = tmp_path / f"rows.{ending}{'.gz' if zipped else ''}"
    file.write_bytes(gzip.compress(data) if zipped else data)
    assert read_rows(str(file)) == ROWS


def test_a_path_is_relative_to_where_the_command_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.jsonl").write_bytes(as_bytes("jsonl"))
    monkeypatch.chdir(tmp_path)
    assert read_rows("my.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", '{"text": "a"}\n{"text": "b"}\n'),  # the Hub's .json is often one object per line
        ("list.jsonl", '[{"text": "a"},\n {"text": "b"}]'),
        ("blank.jsonl", '\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b"}'),
        ("excel.csv", "\ufefftext;n\r\na;1\r\nb;2\r\n"),
        ("blank.csv", "text,n\na,1\n\nb,2\n"),
    ],
)
def test_files_that_are_a_little_different_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8", newline="")
    assert [row["text"] for row in read_rows(str(tmp_path / name))] == ["a", "b"]


def test_one_json_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{\n "text": "a"\n}')
    (tmp_path / "one.jsonl").write_text('{"text": "a"}')
    assert read_rows(str(tmp_path / "one.json")) == read_rows(str(tmp_path / "one.jsonl")) == [{"text": "a"}]


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"text,n\n{'x' * 200_000},1\n")
    assert len(read_rows(str(tmp_path / "long.csv"))[0]["text"]) == 200_000


def test_a_csv_row_is_placed_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text('prompt,completion\n"a\nb",c\nd,e\n')
    table = read_table(str(tmp_path / "my.csv"))
    assert [table.place(i).rpartition(", ")[2] for i in range(2)] == ["line 2", "line 4"]


# --- what cannot be read -----------------------------------------------------------------------


def test_a_missing_file_is_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(as_bytes("jsonl"))
    with pytest.raises(RequestError) as caught:
        read_rows(str(tmp_path / "trian.jsonl"))
    (problem,) = caught.value.problems
    assert problem.what.endswith("trian.jsonl does not exist")
    assert problem.remedy == f"did you mean {tmp_path / 'train.jsonl'}?"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere/my.jsonl", "nor does the folder nowhere"),
        (".", "is a folder"),
        ("notes.pdf", "cannot tell the format"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pdf").write_text("hello")
    with pytest.raises(RequestError, match=what):
        read_rows(path)


def test_not_utf8_says_which_line(tmp_path: Path) -> None:
    (line,) = wrong(tmp_path, "my.csv", "prompt,completion\na,b\ncafé,c\n".encode("latin-1"))
    assert line.startswith("my.csv, line 3: byte 0xe9 is not UTF-8 (save the file as UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("my.jsonl.gz", b"\x1f\x8b\x08broken", "is damaged"),
        ("my.jsonl.gz", b"not zipped", "is damaged"),
        ("my.parquet", b"PAR1 but not really", "is no Parquet file"),
        (
            "my.json",
            '[{"prompt": "a",\n "completion" "b"}]',
            "line 2: broken JSON: Expecting ':' delimiter (column 15)",
        ),
        ("my.json", '{\n "prompt": \n', "line 3: broken JSON"),
        ("my.json", '"text"', "row 1: is text, not an object"),
        ("my.jsonl", "", "my.jsonl: holds no rows"),
        ("my.csv", "prompt,completion\n", "my.csv: holds no rows"),
        ("my.json", "[]", "my.json: holds no rows"),
        ("my.csv", "prompt,prompt\na,b\n", "line 1: two columns are called prompt"),
        ("my.csv", "prompt,,completion\na,b,c\n", "line 1: column 2 has no name"),
        ("my.csv", "prompt,completion\na,b,c\n", "line 2: has 3 cells where the header has 2"),
        ("my.csv", 'prompt,completion\na,b\nc,"d\n', "line 3: broken CSV: unexpected end of data"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, name: str, content: str | bytes, what: str) -> None:
    assert what in wrong(tmp_path, name, content)[0]


def test_read_rows_refuses_broken_lines(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RequestError, match="broken JSON"):
        read_rows(str(tmp_path / "my.jsonl"))


# --- shapes ------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "changes", "shape"),
    [
        ({"messages": []}, {}, "chat"),
        ({"messages": [], "prompt": "", "completion": "", "text": ""}, {}, "chat"),
        ({"prompt": "", "completion": ""}, {}, "prompt_completion"),
        ({"text": "", "prompt": ""}, {}, "text"),
        (
            {"question": "", "answer": ""},
            {"prompt_field": "question", "completion_field": "answer"},
            "prompt_completion",
        ),
        ({"conversations": []}, {"messages_field": "conversations"}, "chat"),
        ({"body": ""}, {"text_field": "body"}, "text"),
        ({"messages": [], "text": ""}, {"format": "text"}, "text"),
    ],
)
def test_a_shape_is_told_by_its_fields(row: dict[str, Any], changes: dict[str, Any], shape: str) -> None:
    assert detect_format(row, spec(**changes)) == shape


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        (["question", "reply"], "write data.prompt_field=question data.completion_field=reply"),
        (["inputs", "targets"], "write data.prompt_field=inputs data.completion_field=targets"),  # Aya
        (["prompt", "reply"], "write data.completion_field=reply"),
        (["article", "highlights", "id"], "write data.prompt_field=article data.completion_field=highlights"),
        (["dialogue", "summary"], "write data.prompt_field=dialogue data.completion_field=summary"),  # no list of turns
        (["title", "content"], "write data.text_field=content"),
        (["instruction", "context", "reply"], "write data.output_field=reply data.input_field=context"),
        (["x"], "write data.messages_field=…"),
    ],
)
def test_unknown_fields_are_answered_with_the_keys_to_set(fields: list[str], remedy: str) -> None:
    with pytest.raises(RequestError, match="cannot tell what to learn") as caught:
        detect_format({name: f"a text of {name}" for name in fields}, spec())
    assert caught.value.problems[0].remedy is not None
    assert caught.value.problems[0].remedy.startswith(remedy)


def test_a_pair_of_texts_becomes_two_turns() -> None:
    example = canonical_row({"prompt": "2 + 2?", "completion": "4", "id": 7}, "row 1", spec())
    assert example == Example(prompt=[USER], completion=[ANSWER])


def test_a_conversation_is_split_after_the_last_turn_that_is_not_the_assistants() -> None:
    turns = [SYSTEM, USER, ANSWER, USER, ANSWER, ANSWER]
    example = canonical_row({"messages": turns}, "row 1", spec())
    assert (example.prompt, example.completion) == (turns[:4], turns[4:])
    tool = {"role": "tool", "content": "4"}
    example = canonical_row({"messages": [USER, ANSWER, tool, ANSWER]}, "row 1", spec())
    assert (example.prompt, example.completion) == ([USER, ANSWER, tool], [ANSWER])


def test_two_lists_of_turns_are_taken_as_they_are() -> None:
    example = canonical_row({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "row 1", spec())
    assert (example.prompt, example.completion) == ([SYSTEM, USER], [ANSWER])


def test_sharegpt_turns_are_understood() -> None:
    turns = [{"from": "human", "value": "2 + 2?", "weight": None}, {"from": "gpt", "value": "4", "weight": 1}]
    example = canonical_row({"conversations": turns}, "row 1", spec(messages_field="conversations"))
    assert (example.prompt, example.completion) == ([USER], [ANSWER])


def test_plain_text_stays_plain() -> None:
    assert canonical_row({"text": " a\n"}, "row 1", spec(system_prompt="Be brief.")) == Example(text=" a\n")


def test_the_system_prompt_is_put_before_conversations_that_have_none() -> None:
    brief = spec(system_prompt="Be brief.")
    for row in ({"prompt": "2 + 2?", "completion": "4"}, {"messages": [USER, ANSWER]}):
        assert canonical_row(row, "row 1", brief).prompt == [SYSTEM, USER]
    own = {"role": "system", "content": "Rhyme."}
    assert canonical_row({"messages": [own, USER, ANSWER]}, "row 1", brief).prompt == [own, USER]


# --- rows that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "what", "remedy"),
    [
        ({"prompt": "a"}, "has no field completion", "add completion"),
        ({"prompt": "a", "completions": "b"}, "has no field completion", "is completions misspelt?"),
        ({"prompt": "a", "completion": " \n"}, "completion is empty", "fill it in, or delete the row"),
        ({"prompt": "", "completion": "b"}, "prompt is empty", "fill it in, or delete the row"),
        ({"prompt": "a", "completion": None}, "completion is null, not text", "write it as text in quotes"),
        ({"prompt": "a", "completion": 4}, "completion is a number, not text", "write it as text in quotes"),
        (
            {"prompt": "a", "completion": True},
            "completion is true or false, not text",
            "write it as text in quotes",
        ),
        (
            {"prompt": "a", "completion": {"b": 1}},
            "completion is an object, not text",
            "write it as text in quotes",
        ),
        (
            {"prompt": "a", "completion": "\ud83d"},
            "completion holds half a character",
            "write the character itself",
        ),
        ({"prompt": [USER], "completion": "4"}, "completion is text, not a list of turns", 'write [{"role"'),
        (
            {"prompt": [USER], "completion": [USER]},
            "completion does not end with an assistant turn",
            "add the answer",
        ),
        (
            {"prompt": [SYSTEM], "completion": [ANSWER]},
            "completion has no user turn before the answer",
            "put the",
        ),
    ],
)
def test_a_wrong_pair_is_explained(row: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(RequestError) as caught:
        canonical_row(row, "my.jsonl, line 3", spec(format="prompt_completion"))
    (problem,) = caught.value.problems
    assert problem.source == "my.jsonl, line 3"
    assert problem.what.startswith(what)
    assert problem.remedy is not None
    assert problem.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ("hello", "messages is text, not a list of turns"),
        ([], "messages is an empty list"),
        (["hello"], "messages[0] is text, not a turn"),
        ([USER, {"role": "assistant"}], "messages[1] has no content"),
        ([USER, {"content": "4"}], "messages[1] has no role"),
        ([USER, {"role": "assitant", "content": "4"}], "messages[1] has the unknown role 'assitant'"),
        ([USER, {"role": None, "content": "4"}], "messages[1] has the unknown role None"),
        ([USER, {"role": ["user"], "content": "4"}], "messages[1] has the unknown role ['user']"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null, not text"),
        (
            [USER, {"role": "assistant", "content": [{"type": "text"}]}],
            "messages[1].content is a list, not text",
        ),
        ([USER, {"role": "assistant", "content": ""}], "messages[1].content is empty"),
        ([USER], "messages does not end with an assistant turn"),
        ([USER, ANSWER, USER], "messages does not end with an assistant turn"),
        ([ANSWER], "messages has no user turn before the answer"),
        ([SYSTEM, ANSWER], "messages has no user turn before the answer"),
    ],
)
def test_a_wrong_conversation_is_explained(turns: Any, what: str) -> None:
    with pytest.raises(RequestError) as caught:
        canonical_row({"messages": turns}, "row 1", spec())
    assert [problem.what for problem in caught.value.problems] == [what]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a", "completion": "b"}',
        '{"prompt": "a", "completion": }',
        '["a", "b"]',
        "",
        '{"prompt": "a"}',
        '{"prompt": 1, "completion": ""}',
    ]
    objects = 'write an object such as {"prompt": "…", "completion": "…"}'
    assert sorted(wrong(tmp_path, "my.jsonl", "\n".join(lines))) == [
        f"my.jsonl, line 2: broken JSON: Expecting value (column 31) ({objects})",
        f"my.jsonl, line 3: is a list, not an object ({objects})",
        "my.jsonl, line 5: has no field completion (add completion)",
        "my.jsonl, line 6: completion is empty (fill it in, or delete the row)",
        "my.jsonl, line 6: prompt is a number, not text (write it as text in quotes)",
    ]


def test_mistakes_of_both_files_are_told_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a", "completion": ""}')
    told = wrong(tmp_path, "my.jsonl", '{"prompt": "", "completion": "b"}', eval_path=str(tmp_path / "eval.jsonl"))
    assert [line.partition(" (")[0] for line in told] == [
        "my.jsonl, line 1: prompt is empty",
        "eval.jsonl, line 1: completion is empty",
    ]


def test_the_first_twenty_mistakes_are_spelled_out(tmp_path: Path) -> None:
    told = wrong(tmp_path, "my.jsonl", '{"text": ""}\n' * 1000)
    assert len(told) == 21
    assert told[19].startswith("my.jsonl, line 20: text is empty")
    assert told[20].startswith(": and 980 more")


def test_unknown_fields_are_told_once_not_for_every_row(tmp_path: Path) -> None:
    told = wrong(tmp_path, "my.csv", "question,reply\na,b\nc,d\n")
    assert told == [
        "my.csv, line 2: cannot tell what to learn by the fields: question, reply "
        "(write data.prompt_field=question data.completion_field=reply)"
    ]


# --- load, split, fingerprint ------------------------------------------------------------------


def many(tmp_path: Path, count: int, name: str = "my.jsonl") -> str:
    text = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count))
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_share_of_the_rows_is_held_out(tmp_path: Path) -> None:
    path = many(tmp_path, 100)
    train, held = load_examples(spec(path=path, eval_fraction=0.1), seed=1)
    assert (len(train), len(held)) == (90, 10)
    assert {e.text for e in train} | {e.text for e in held} == {f"my.jsonl {i}" for i in range(100)}
    assert load_examples(spec(path=path, eval_fraction=0.1), seed=1) == (train, held)
    assert load_examples(spec(path=path, eval_fraction=0.1), seed=2) != (train, held)


def test_a_file_of_its_own_is_held_out(tmp_path: Path) -> None:
    paths = {"path": many(tmp_path, 5), "eval_path": many(tmp_path, 3, "eval.jsonl")}
    assert len(load_examples(spec(**paths, max_eval_examples=1), seed=1)[1]) == 1
    train, held = load_examples(spec(**paths, max_examples=2), seed=1)
    assert [e.text for e in train] == ["my.jsonl 0", "my.jsonl 1"]
    assert [e.text for e in held] == ["eval.jsonl 0", "eval.jsonl 1", "eval.jsonl 2"]


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(100, 0.05, 5), (3, 0.05, 1), (2, 0.99, 1), (1, 0.5, 0), (0, 0.5, 0), (9, 0.0, 0)],
)
def test_a_split_leaves_something_on_both_sides(count: int, fraction: float, held: int) -> None:
    train, out = split(range(count), fraction, seed=3)
    assert len(out) == held
    assert sorted(train + out) == list(range(count))
    assert (train, out) == (sorted(train), sorted(out))


def test_the_bundled_data_set_loads_with_its_system_prompt() -> None:
    train, held = load_examples(DataSpec(source="commands", system_prompt="Answer with the command only."), seed=1)
    assert (len(train), len(held)) == (600, 40)
    assert [turn["role"] for turn in train[0].prompt] == ["system", "user"]
    assert held[0].completion[0]["content"] == commands_dataset.examples()[1][0]["completion"]
    assert load_examples(DataSpec(source="commands", max_examples=7), seed=1)[0] == [
        Example(e.prompt[1:], e.completion) for e in train[:7]
    ]


def test_the_fingerprint_is_of_the_content_alone() -> None:
    one, two = Example([USER], [ANSWER]), Example(text="a")
    turned = Example([dict(reversed(USER.items()))], [ANSWER])
    assert fingerprint([one, two]) == fingerprint(iter([turned, two]))
    different = [[one], [two, one], [one, two, two], [Example([ANSWER], [USER]), two]]
    assert len({fingerprint(examples) for examples in [[one, two], *different]}) == 5
    assert fingerprint([Example(text="\ud83d é")])  # half a character has no bytes, and still a fingerprint


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from runner.data import load; from runner.spec import DataSpec;"
        "load.load_examples(DataSpec(source='commands'), 0);"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ASSETS, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- the Hub -----------------------------------------------------------------------------------


def test_a_data_set_is_loaded_as_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` reads a folder the way it reads a repository: the real thing, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    for name, count in (("train.jsonl", 30), ("test.jsonl", 4)):
        many(tmp_path / "org" / "name", count, name)
    train, held = load_examples(DataSpec(source="hub", id="org/name", eval_split="test", max_examples=10), seed=0)
    assert [e.text for e in train] == [f"train.jsonl {i}" for i in range(10)]
    assert len(held) == 4
    train, held = load_examples(DataSpec(source="hub", id="org/name", eval_fraction=0.1), seed=0)
    assert (len(train), len(held)) == (27, 3)
    with pytest.raises(RequestError) as caught:
        load_examples(DataSpec(source="hub", id="org/name", eval_split="tset"), seed=0)
    (problem,) = caught.value.problems
    assert problem.what == "org/name has no split tset"
    assert (problem.source, problem.remedy) == ("data.eval_split", "did you mean data.eval_split=test?")
    with pytest.raises(RequestError) as caught:
        load_examples(DataSpec(source="hub", id="org/name", text_field="body"), seed=0)
    assert caught.value.problems[0].source == "org/name train, row 1"


class DatasetNotFoundError(FileNotFoundError):
    """Stands for datasets' own, which a test of a pure function need not import."""


GATED = "Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated to access it."
SUBSETS = "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample: …"


@pytest.mark.parametrize(
    ("error", "changes", "what", "remedy"),
    [
        (
            ConnectionError("Couldn't reach 'org/name'"),
            {},
            "org/name: the Hugging Face Hub cannot be",
            "check the net",
        ),
        (
            DatasetNotFoundError(GATED),
            {},
            "org/name is gated",
            "accept its terms at https://huggingface.co/datasets/org",
        ),
        (
            DatasetNotFoundError("Dataset 'org/name' doesn't exist"),
            {},
            "org/name is not on the Hugging",
            "check the sp",
        ),
        (
            DatasetNotFoundError("Revision 'v9' doesn't exist for dataset 'org/name' on the Hub."),
            {"revision": "v9"},
            "org/name has no revision v9",
            "see https://huggingface.co/datasets/org/name/tree/main",
        ),
        (ValueError(SUBSETS), {}, "org/name has several subsets", "write data.subset= one of main, socratic"),
        (
            ValueError("BuilderConfig 'mian' not found. Available: ['main', 'socratic']"),
            {"subset": "mian"},
            "org/name has no subset mian",
            "did you mean data.subset=main?",
        ),
        (
            ValueError("Unknown split \"x\". Should be one of ['train', 'test']."),
            {"split": "x"},
            "org/name has no split x",
            "write data.split= one of train, test",
        ),
        (
            RuntimeError("Dataset scripts are\nno more"),
            {},
            "org/name cannot be loaded: Dataset scripts are",
            "see http",
        ),
    ],
)
def test_what_goes_wrong_with_the_hub_is_said_in_one_line(
    error: Exception, changes: dict[str, Any], what: str, remedy: str
) -> None:
    data = DataSpec(source="hub", id="org/name", **changes)
    problem = hub.problem_of(error, data, "split", data.split)
    assert problem.what.startswith(what)
    assert problem.remedy is not None
    assert problem.remedy.startswith(remedy)
    assert "\n" not in problem.what + problem.remedy


def test_without_a_network_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="the Hugging Face Hub cannot be reached"):
        load_examples(DataSpec(source="hub", id="org/no-such-data-set"), seed=0)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "x.jsonl, line 2"),
        ("x.json", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "x.json, line 2"),
        ("x.jsonl", '{"text": "b", "text": "c"}', "x.jsonl, line 1"),
        ("x.json", '[\n {"text": "a"},\n {"m": [{"n": {"text": 1, "text": 1}}]},\n {"text": "d"}]', "x.json, row 2"),
        ("x.json", '{"text": "b",\n "text": "c"}', "x.json, row 1"),
    ],
)
def test_a_key_that_stands_twice_in_a_row_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text, "utf-8")
    for table in (read_table(name), *tables(name)):
        assert [str(p.source) for p in table.problems] == [place]
        assert "the key 'text' occurs twice in one object" in table.problems[0].what
        assert list(table.rows) == [{"text": letter} for letter in "ad" if f'"{letter}"' in text]


ASKED = {"role": "user", "content": "?"}
TWO = {"name": "f", "arguments": '{"y": 1, "y": 2}'}
TWICE = '{"name": "f", "arguments": {"x": 1, "x": 2}}'


@pytest.mark.parametrize(
    ("row", "field", "key"),
    [
        ({"messages": '[{"role": "user", "role": "assistant", "content": "a"}]'}, "messages", "role"),
        ({"messages": [ASKED, {"role": "assistant", "content": "a"}], "tools": f"[{TWICE}]"}, "tools", "x"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": f"[{TWICE}]"}]}, "messages[1].tool_calls[0]", "x"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [TWICE]}]}, "messages[1].tool_calls[0]", "x"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [TWO]}]}, "messages[1].tool_calls[0]", "y"),
        ({"prompt": "a", "answer": '[{"role": "assistant", "content": "4", "content": "5"}]'}, "answer", "content"),
    ],
)
def test_a_key_that_stands_twice_in_json_text_of_a_field_is_refused(row: dict[str, Any], field: str, key: str) -> None:
    with pytest.raises(RequestError) as caught:
        canonical_row(row, "here", spec(), "prompts" if "answer" in row else "sft")
    assert f"{field}: the key '{key}' occurs twice in one object" in [problem.what for problem in caught.value.problems]


@pytest.mark.parametrize("name", ["data", "the 'rows'"])
def test_rows_in_a_list_of_one_object_are_told_with_what_takes_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "completion": "é"}] * 2
    Path("my rows.json").write_text(json.dumps({"version": "1", "tags": [], name: rows}), "utf-8")
    with pytest.raises(RequestError) as caught:
        load_examples(DataSpec(source="file", path="my rows.json"), seed=0)
    (problem,) = caught.value.problems
    assert problem.remedy is not None and problem.remedy.startswith(f"its list {name} holds the rows: python -c ")
    typed = problem.remedy.partition(": ")[2].removesuffix(", and write data.path=rows.json")
    subprocess.run(typed.replace("python", sys.executable, 1), shell=True, check=True)
    assert read_rows("rows.json") == rows
