"""Rows, chat template and reward functions are checked before anything is made, loaded or rented."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from runner.data import row_checks
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from tests.conftest import ROOT
from tests.support.front import refused, runner, write

pytestmark = pytest.mark.usefixtures("here", "started")

ROW = '{"prompt": "a", "completion": "b"}\n'
HERE = ("data=file", "train.max_steps=1")
RENTED = (*HERE, "where=runpod", "hw=rtx4090", "model=mistral7b", "method=qlora4")
GRPO = ("objective=grpo", "train.batch_size=8", "train.micro_batch_size=8", "data.path=questions.jsonl")


@pytest.mark.parametrize("place", [HERE, RENTED], ids=["here", "rented"])
@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.jsonl", ROW + "{oops\n", "broken JSON: Expecting property name enclosed in double quotes"),
        ("rows.jsonl", ROW + '{"prompt": "a", "completion": 5}\n', "is a number, not text (rows.jsonl, line 2)"),
        ("rows.jsonl", ROW + '{"prompt": "a", "completion": " "}\n', "completion is empty (rows.jsonl, line 2)"),
        ("rows.jsonl", ROW + '{"prompt": "a"}\n', "has no field completion (rows.jsonl, line 2)"),
        ("rows.jsonl", ROW + "[1]\n", "is a list, not an object (rows.jsonl, line 2)"),
        ("rows.jsonl", "\n\n", "holds no rows (rows.jsonl)"),
        ("rows.json", "[]", "holds no rows (rows.json)"),
        ("rows.csv", "prompt,completion\na\n", "has 1 cells where the header has 2 (rows.csv, line 2)"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "\xe9"}\n', "byte 0xe9 is not UTF-8 (rows.jsonl, line 1)"),
        ("rows.csv", "prompt,completion\na,b\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 rows.csv"),
        ("rows.jsonl.gz", b"no gzip", "damaged"),
        ("rows.parquet", b"PAR", "rows.parquet is no Parquet file"),
        ("rows.jsonl", '{"a": 1}\n', "cannot tell what to learn by the fields: a (rows.jsonl, line 1)"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_as_training_would(
    here: Path, place: tuple[str, ...], name: str, content: str | bytes, what: str
) -> None:
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert what in refused(here, *place, f"data.path={name}")


def test_all_mistakes_are_said_at_once_and_held_out_rows_count(here: Path) -> None:
    write(here / "rows.jsonl", ROW + "{oops\n" + '{"prompt": "a", "completion": ""}\n')
    write(here / "held.jsonl", '{"prompt": 1, "completion": "b"}\n')
    said = refused(here, *HERE, "data.path=rows.jsonl", "data.eval_path=held.jsonl")
    assert all(place in said for place in ("rows.jsonl, line 2", "rows.jsonl, line 3", "held.jsonl, line 1"))
    write(here / "held.jsonl", "")
    write(here / "rows.jsonl", ROW)
    assert "holds no rows (held.jsonl)" in refused(here, *HERE, "data.path=rows.jsonl", "data.eval_path=held.jsonl")


def test_rows_that_are_skipped_are_refused_only_where_none_is_left(here: Path, started: list[RunDir]) -> None:
    words = (*HERE, "data.path=rows.jsonl", "data.on_error=skip")
    write(here / "rows.jsonl", "{oops\n")
    assert "broken JSON" in refused(here, *words)
    write(here / "rows.jsonl", ROW + "{oops\n")
    assert runner(*words).exit_code == 0 and started


def test_measurements_need_held_out_rows(here: Path, started: list[RunDir]) -> None:
    write(here / "one.jsonl", ROW)
    write(here / "two.jsonl", ROW * 2)
    words = (*HERE, "eval.every_steps=1")
    for more in (("data.path=one.jsonl",), ("data.path=two.jsonl", "data.eval_fraction=0")):
        said = refused(here, *words, *more)
        assert "eval.every_steps=1 measures held-out rows, and there are none (eval.every_steps)" in said
    for more in (("data.path=two.jsonl",), ("data.path=one.jsonl", "data.eval_path=one.jsonl")):
        assert runner(*words, *more).exit_code == 0
    assert runner("data=commands", "train.max_steps=1", "eval.every_steps=1", "data.eval_fraction=0").exit_code == 0
    assert len(started) == 3
    corpus = (
        "objective=pretrain",
        "objective.experiment=mine",
        "model=scratch_22m",
        "method=full",
        "objective.mode=prod",
    )
    write(here / "docs.txt", "a\nb\n")
    said = refused(here, *words, *corpus, "data.path=docs.txt", "train.max_length=512", "objective.mode=prod")
    assert "objective.mode=split" in said


@pytest.mark.parametrize(
    ("objective", "needs"),
    [("dpo", "a chosen and a rejected answer"), ("reward", "a chosen"), ("kto", "an answer and a label, good or not")],
)
def test_rows_of_another_objective_are_refused(here: Path, objective: str, needs: str) -> None:
    write(here / "rows.jsonl", ROW)
    assert needs in refused(here, *HERE, f"objective={objective}", "data.path=rows.jsonl")


def test_every_point_of_a_sweep_is_checked_before_the_first_one(here: Path, started: list[RunDir]) -> None:
    write(here / "a.jsonl", ROW)
    write(here / "b.jsonl", ROW + "{oops\n")
    result = runner("-m", *HERE, "data.path=a.jsonl,b.jsonl")
    assert "1 of 2 points cannot run" in result.stderr and "b.jsonl, line 2" in result.stderr
    assert len(started) == 1


def test_points_that_read_the_same_are_checked_once(
    here: Path, started: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[RunSpec] = []
    whole = row_checks.check_rows
    monkeypatch.setattr(row_checks, "check_rows", lambda spec: counted.append(spec) or whole(spec))
    write(here / "rows.jsonl", ROW)
    result = runner("-m", *HERE, "data.path=rows.jsonl", "train.learning_rate=1e-3,1e-4")
    assert len(started) == 2 and len(counted) == 1, result.output
    write(here / "rows.jsonl", "{oops\n")
    assert "rows.jsonl, line 1" in refused(here, "-m", *HERE, "data.path=rows.jsonl", "train.learning_rate=1e-3,1e-4")


def test_prepare_checks_without_loading_anything(here: Path) -> None:
    write(here / "rows.jsonl", ROW + "{oops\n")
    assert "rows.jsonl, line 2" in refused(here, "data", "prepare", "data.path=rows.jsonl")


def test_documents_for_shards_are_checked(here: Path) -> None:
    write(here / "docs.jsonl", '{"text": "a"}\n{"body": "b"}\n')
    words = (
        *HERE,
        "objective=pretrain",
        "objective.experiment=mine",
        "model=scratch_22m",
        "method=full",
        "train.max_length=512",
    )
    said = refused(here, *words, "data.path=docs.jsonl")
    assert "has no text in its field text (docs.jsonl, line 2) → write data.text_field=" in said


REWARD = """\
import math

def score(completions, tests, **rest):
    return [1.0 for _ in completions]

def narrow(completions):
    return [1.0 for _ in completions]

async def later(completions, **rest):
    return [1.0 for _ in completions]

try:
    better = score
except ImportError:
    pass
"""


@pytest.mark.parametrize(
    ("reward", "content", "what"),
    [
        ("scor", REWARD, "has no function scor (objective.rewards=./reward.py:scor) → did you mean ./reward.py:score?"),
        ("score", "def score(completions, **rest):\n    return [\n", "line 2: SyntaxError: '[' was never closed"),
        ("score", "x = '\0'", "./reward.py cannot be read"),
        ("narrow", REWARD, "narrow(completions) does not accept its other arguments"),
        ("later", REWARD, "later(completions, **rest) is asynchronous"),
        ("score", "def score(completions, key, **rest): ...", "needs key, which the rows do not have"),
        ("score", "import nothing_like_it\ndef score(**rest): ...", "No module named 'nothing_like_it'"),
        ("score", "from .helper import one\ndef score(**rest): ...", "write from helper import"),
    ],
)  # fmt: skip
def test_a_reward_function_is_looked_at_without_running_it(here: Path, reward: str, content: str, what: str) -> None:
    write(here / "questions.jsonl", '{"prompt": "Q", "answer": "1", "level": 3}\n' * 8)
    write(here / "reward.py", content)
    assert what in refused(here, *HERE, *GRPO, f"objective.rewards=[./reward.py:{reward}]")


@pytest.mark.parametrize(
    "content",
    [
        "def score(completions, level, answer=None, *, prompts=(), **rest): ...",
        "raise SystemExit\ndef score(**rest): ...",  # it is not run
        "from operator import add as score",
        "score = lambda **rest: []",
        "class score: ...",
        "globals()['sco' + 're'] = print",
        "try:\n    import nothing_like_it\nexcept ImportError:\n    pass\ndef score(**rest): ...",
    ],
)
def test_a_reward_function_that_may_be_right_is_left_to_training(
    here: Path, started: list[RunDir], content: str
) -> None:
    write(here / "questions.jsonl", '{"prompt": "Q", "answer": "1", "level": 3}\n' * 8)
    write(here / "reward.py", content)
    result = runner(*HERE, *GRPO, "objective.rewards=[./reward.py:score]")
    assert result.exit_code == 0 and started, result.output


def test_a_reward_function_that_imports_modules_of_this_machine_is_refused_for_a_pod(here: Path) -> None:
    """A pod gets its one file: the import would fail there, after the model was loaded."""
    write(here / "questions.jsonl", '{"prompt": "Q", "answer": "1", "level": 3}\n' * 8)
    write(here / "mine" / "helper.py", "def one(): return 1.0\n")
    write(here / "mine" / "reward.py", "from helper import one\n" + REWARD)
    words = (*GRPO, "objective.rewards=[mine/reward.py:better]")
    said = refused(here, *RENTED, *words)
    assert "mine/reward.py imports modules of this machine (helper.py), and a pod gets reward.py alone" in said
    assert runner(*HERE, *words).exit_code == 0


def test_a_pattern_that_cannot_be_read_is_refused(here: Path) -> None:
    write(here / "questions.jsonl", '{"prompt": "Q"}\n' * 8)
    words = (*HERE, *GRPO, "objective.rewards=[regex]", "objective.reward_regex='\"(\"'")
    assert "unterminated subpattern" in refused(here, *words)


def test_a_chat_template_is_tried_on_the_rows_before_a_tokenizer_is_here(here: Path, started: list[RunDir]) -> None:
    write(here / "rows.jsonl", ROW)
    write(here / "mine.jinja", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    words = (*HERE, "model=mistral7b", "method=qlora4", "hw=rtx4090", "where=runpod", "data.path=rows.jsonl")
    said = refused(here, *words, "data.chat_template=mine.jinja", "data.system_prompt=hi")
    assert "refuses a conversation: no system (rows.jsonl, line 1)" in said
    write(here / "broken.jinja", "{% for m in %}")
    assert "the chat template is no Jinja: line 1" in refused(here, *words, "data.chat_template=broken.jinja")
    # What a template makes of special tokens is known where the tokenizer is.
    write(here / "mine.jinja", "{{ bos_token + nothing.at_all }}")
    assert runner(*HERE, "data.path=rows.jsonl", "data.chat_template=mine.jinja").exit_code == 0 and started


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_what_the_template_hides_of_a_row_is_refused_before_anything_is_made(here: Path, objective: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]}
    asked, said = [{"role": "user", "content": "q"}], {"role": "assistant", "content": "no"}
    rows: dict[str, dict[str, Any]] = {
        "sft": {"messages": [*asked, call]},
        "dpo": {"prompt": asked, "chosen": [call], "rejected": [said]},
        "kto": {"prompt": asked, "completion": [call], "label": True},
    }
    write(here / "calls.jsonl", json.dumps(rows[objective]) + "\n")
    words = (*RENTED, "data.path=calls.jsonl", f"objective={objective}", "data.chat_template=llama3")
    said_so = refused(here, *words)
    assert "the chat template does not show the tool calls of turn 2 (calls.jsonl, line 1)" in said_so
    assert "set data.chat_template to one that shows them (such as qwen)" in " ".join(said_so.split())


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json"])
def test_of_large_files_the_beginning_is_checked_and_how_much_is_said(
    here: Path, started: list[RunDir], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(row_checks, "WHOLE_BYTES", 3_000_000)
    rows = [{"prompt": f"question {n}", "completion": "word " * 40} for n in range(20_000)]
    text = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "csv": "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows),
    }[ending]
    write(here / f"rows.{ending}", text)
    began = time.perf_counter()
    result = runner(*HERE, f"data.path=rows.{ending}")
    assert result.exit_code == 0 and len(started) == 1, result.output
    assert time.perf_counter() - began < 30  # 0.3 s alone
    (note,) = [line for line in result.output.splitlines() if "were checked" in line]
    count = int(note.split()[3].replace(",", ""))
    assert 5_000 < count < 20_000 and f"rows of rows.{ending}" in note
    write(here / f"rows.{ending}", text.replace("question 7", "", 1).replace('"prompt": "",', '"prompt": 7,'))
    said = refused(here, *HERE, f"data.path=rows.{ending}")
    assert "prompt is" in said


@pytest.fixture
def served(here: Path) -> Iterator[str]:
    """The folder behind a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(here)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("place", [HERE, RENTED], ids=["here", "rented"])
def test_what_is_behind_a_url_is_checked_where_it_answers(here: Path, served: str, place: tuple[str, ...]) -> None:
    write(here / "rows.jsonl", ROW + "{oops\n")
    assert f"{served}/rows.jsonl, line 2" in refused(here, *place, f"data.path={served}/rows.jsonl")
    assert f"{served}/gone.jsonl cannot be read" in refused(here, *place, f"data.path={served}/gone.jsonl")
    write(here / "rows.json", '[{"prompt": "a"}]')
    words = (f"data.path={served}/rows.json", "data.format=prompt_completion")
    assert "has no field completion" in refused(here, *place, *words)


def test_what_does_not_answer_is_left_to_whoever_loads_it(here: Path, started: list[RunDir]) -> None:
    result = runner(*HERE, "data.path=http://127.0.0.1:9/rows.jsonl")
    assert result.exit_code == 0 and started
    assert "127.0.0.1:9/rows.jsonl cannot be read" in result.output and "when they are loaded" in result.output


def test_a_data_set_that_answers_as_the_hub_does_is_checked(here: Path) -> None:
    """`load_dataset` reads a folder the way it reads a repository."""
    write(here / "org" / "name" / "train.jsonl", ROW)
    write(here / "org" / "name" / "test.jsonl", '{"prompt": "a", "completion": ""}\n')
    words = ("data=hub", "data.id=org/name", "train.max_steps=1")
    assert "completion is empty (org/name test, row 1)" in refused(here, *words, "data.eval_split=test")
    assert "did you mean data.eval_split=test?" in refused(here, *words, "data.eval_split=tset")
    assert "a chosen and a rejected answer" in refused(here, *words, "objective=dpo")


def test_no_torch_is_loaded_for_it(here: Path) -> None:
    write(here / "questions.jsonl", '{"prompt": "Q", "answer": "1"}\n' * 8)
    write(here / "reward.py", REWARD)
    write(here / "check.py", (
        "import sys\nfrom runner.runs.content_checks import check_contents\nfrom tests.support.front import spec_of\n"
        f"check_contents(spec_of(*{(*HERE, *GRPO, 'objective.rewards=[./reward.py:better]')!r}))\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'fsspec') if m in sys.modules])\n"
    ))  # fmt: skip

    done = subprocess.run([sys.executable, "check.py"], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"problem": "3 + 4?", "solution": "7"}, "data.answer_field=solution"),
        ({"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"ground_truth": "7"}}, "data.answer_field=…"),
        ({"prompt": "Q", "answer": None, "gold": "7"}, "data.answer_field=gold"),
    ],
)
def test_answers_to_compare_with_are_there(here: Path, row: dict[str, Any], remedy: str) -> None:
    write(here / "questions.jsonl", "".join(json.dumps(row) + "\n" for _ in range(8)))
    told = refused(here, "data=file", *GRPO)
    assert "exact_match compares with the row's answer, and no row has one" in told and f"write {remedy}" in told


def test_columns_to_ignore_are_there(here: Path) -> None:
    rows = '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "context": "c"}\n'
    write(here / "my.jsonl", rows)
    told = refused(here, "data=file", "data.path=my.jsonl", "data.ignore_columns=[context,contxt]")
    assert "no row has the column contxt" in told and "did you mean context?" in told
    assert (
        runner("data=file", "data.path=my.jsonl", "train.max_steps=1", "data.ignore_columns=[context]").exit_code == 0
    )
