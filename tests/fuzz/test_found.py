"""What fuzzing has found, each kind with its smallest example: a traceback, a crash or a hang before."""

from __future__ import annotations

import gzip
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner.cli.options import request_of
from runner.cloud import adopted_spec
from runner.config import conf_files, json_text, other_trainers, recipe_checks
from runner.config.compose import compose
from runner.config.deepspeed_json import read_deepspeed_json
from runner.config.spec_json import load_spec
from runner.data.chat_template import Template
from runner.data.chat_tokenizer import template_of
from runner.data.load import canonical_rows
from runner.data.readers.files import Table, read_table
from runner.data.readers.streams import tables
from runner.data.template_sandbox import LARGEST
from runner.errors import LONGEST, Problem, RequestError
from runner.hub.model_config import local_facts
from runner.hub.weight_files import damage_of
from runner.machine.hostfile import read_hostfile
from runner.report.run_list import print_runs, run_rows
from runner.rundir.directory import RunDir
from runner.spec import DataSpec
from tests.conftest import spec_of

DATA = DataSpec(name="x", source="file", path="x.jsonl")
DEEP = "[" * 5000 + "]" * 5000
DIGITS = "1" * 5000


def told(read: Callable[[], object]) -> str:
    """The words of a refusal."""
    with pytest.raises(RequestError) as caught:
        read()
    return "; ".join(problem.what for problem in caught.value.problems)


# --- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [(DEEP, "nested deeper than 100 levels"), ("[" * 101 + "]" * 101, "nested deeper"), (DIGITS, "4,300 digits")],
)
def test_json_that_python_cannot_hold_is_broken_json(text: str, words: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=words):
        json_text.loads(text)
    assert json_text.loads("[" * 100 + "]" * 100) and json_text.loads(b'{"a": [[1]]}') == {"a": [[1]]}


@pytest.mark.parametrize("broken", [DEEP, f'{{"text": {DIGITS}}}', f'{{"text": {DEEP}}}'])
def test_a_line_of_rows_is_named(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "a"}}\n{broken}\n')
    for table in (read_table(str(file)), *tables(str(file))):
        assert len(table.rows) == 1
        (problem,) = table.problems
        assert problem.what.startswith("broken JSON: ") and problem.source == f"{file}, line 2"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": DEEP}, {"conversations": DEEP}, {"messages": f"[{{{DEEP}}}]"}, {"prompt": "a", "completion": f"[{{{DEEP}}}]"},
        {"prompt": f"[{{{DEEP}}}]", "chosen": "a", "rejected": "b"}, {"prompt": "a", "completion": "b", "tools": DEEP},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": DEEP}]},
        {"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]},
    ],
)  # fmt: skip
def test_json_text_in_a_cell_is_read_or_refused(row: dict[str, Any]) -> None:
    found, problems = canonical_rows(Table("x.jsonl", [row]), DATA)
    assert bool(found) != bool(problems)


def test_a_remedy_is_not_looked_for_within_the_search_for_one() -> None:
    row = {"prompt": '[{"role": "user"}]', "answer": "4", "solution": '[{"role": "user"}]'}
    for kind in (None, "sft", "preference", "unpaired", "prompts"):
        found, problems = canonical_rows(Table("x.jsonl", [row, {"messages": []}]), DATA, kind)  # type: ignore[arg-type]  # a text
        assert bool(found) or problems


def test_damaged_archives_and_tables_are_refused(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(os.urandom(4000)))
    data[20:60] = bytes(40)
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert "is damaged" in told(lambda: list(tables(str(tmp_path / "a.jsonl.gz"))))
    footer = b"\x15\xff\xff\xff"
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert "is no Parquet file" in told(lambda: read_table(str(tmp_path / "a.parquet")))
    assert "is no Parquet file" in told(lambda: list(tables(str(tmp_path / "a.parquet"))))


# --- configs -----------------------------------------------------------------------------------------------------


def test_configs_of_a_model_and_of_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(DEEP)
    assert "not JSON: nested" in told(lambda: local_facts(str(tmp_path)))
    (tmp_path / "ds.json").write_text(DEEP)
    assert "is not JSON: nested" in told(lambda: read_deepspeed_json(str(tmp_path / "ds.json")))
    (tmp_path / "ds.json").write_text('{"train_batch_size": 1e999}')
    assert "train_batch_size is Infinity: expected a whole number" in told(
        lambda: read_deepspeed_json(str(tmp_path / "ds.json"))
    )


def test_a_model_of_impossible_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", "head_dim": 10**400}))
    assert "expected a whole number" in told(lambda: local_facts(str(tmp_path)))


def test_half_a_character_in_a_spec_is_named(tmp_path: Path) -> None:
    spec = spec_of("model=mistral7b", "method=lora", "hw=rtx4090").model_dump(mode="json")
    spec["model"]["title"] = "a\ud800"
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert "model.title holds half a character" in told(lambda: load_spec(tmp_path / "spec.json"))
    spec["run"]["name"] = "a\ud800"
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert "run.name holds half a character" in told(lambda: RunDir(tmp_path).spec)


def test_a_group_that_no_folder_can_be_is_refused() -> None:
    assert told(lambda: compose(request_of((f"~{'a' * 300}",), ())))


def test_a_mistake_before_deep_nesting_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f'{{"a": "\\ud800", "b": {DEEP}}}')
    assert "broken YAML" in told(lambda: conf_files.read_file(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("offset", ["1e999", '"8"', "[8]", "null", "8.5", "{}"])
def test_weights_whose_header_has_an_offset_that_is_none(tmp_path: Path, offset: str) -> None:
    header = f'{{"a": {{"data_offsets": [0, {offset}]}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    problem = damage_of(tmp_path / "model.safetensors")
    assert problem is not None and "has a header that is none: it is damaged" in problem.what


def test_a_hostfile_with_a_number_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"worker-0 slots={DIGITS}\nworker-1 slots=\N{ARABIC-INDIC DIGIT FOUR}\n")
    assert told(lambda: read_hostfile(str(tmp_path / "hosts"))).count("cannot read") == 2


LAUGHS = "l0: &l0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- " * 3000, "nested deeper than 100 levels"),
        ("a: " + "{a: " * 50_000, "nested deeper than 100 levels"),  # ended the process
        ("a: &a [x, *a]\n", "*a contains itself"),
        (LAUGHS, "more than 100,000 values"),
    ],
)
def test_yaml_that_would_fill_the_stack_or_the_memory_is_broken_yaml(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert words in told(lambda: conf_files.read_file(file))
    assert words in told(lambda: compose(request_of((str(file),), ())))


@pytest.mark.parametrize(
    "listed", ["5", "[config, 5]", "[config, [a]]", "[config, {a: {b: c}}]", "{a: b}", "[config, null]"]
)
def test_a_defaults_list_of_other_things_is_refused(tmp_path: Path, listed: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: {listed}\n")
    assert isinstance(recipe_checks.choices_and_keys(file), tuple)
    assert not other_trainers.problems_in(file)
    assert told(lambda: compose(request_of((str(file),), ())))


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    spec = spec_of("model=mistral7b", "method=lora", "hw=rtx4090", "where=runpod").model_dump(mode="json")
    spec["data"]["chat_template"] = "a" * 300
    assert adopted_spec.adopt_spec(json.dumps(spec), "p1", None, tmp_path, "runpod").spec


# --- files of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "summary", "lines"),
    [
        ({"state": "running", "created": [0.5], "started": "x", "spent": [1], "num_steps": {}}, {"eval": 5}, "[1]"),
        ({"state": ["done"], "started": 1, "updated": "x", "model": 7}, {"eval": {"after": []}, "seconds": "x"}, "{}"),
        (
            {"state": "done", "spent": 10**400, "created": 1e400},
            {"eval": {"after": {"exact_match": "x"}}},
            '{"step": "3"}',
        ),
        ({"error": ["x"]}, {"eval": {}, "seconds": float("nan")}, '{"loss": [], "step": {}}\n' + DEEP),
        ({"data": DEEP}, {"seconds": float("inf")}, '{"step": 1, "time": "now", "loss": 1.5}'),
    ],
)
def test_files_of_a_run_with_values_of_other_types(
    tmp_path: Path, status: dict[str, Any], summary: dict[str, Any], lines: str
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.write("status.json", {"method": "lora", **status})
    run.write("summary.json", summary)
    (run.path / "metrics.jsonl").write_text(f"{lines}\n")
    assert run.spent() >= 0 and isinstance(run.state(), str)
    (row,) = rows = run_rows(tmp_path)
    assert row["method"] == "lora"  # what is right stays
    print_runs(Console(file=io.StringIO(), width=200), rows, tmp_path)
    run.cut_after(2)


# --- chat templates ----------------------------------------------------------------------------------------------

DOUBLED = (
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"
)
BLOCK = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}"


def rendered(source: str) -> str:
    return Template(source, {}).render([{"role": "user", "content": "a"}]).text


@pytest.mark.parametrize("source", ["{% break %}", "{% for m in messages %}", "{{ 'a", "{% include %}", "{{ " * 500])
def test_a_template_that_is_no_jinja_is_refused(source: str) -> None:
    assert told(lambda: Template(source, {})).startswith("the chat template is no Jinja: ")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_would_never_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.data.template_sandbox.SECONDS", 0.1)
    with pytest.raises(Exception, match="seconds of CPU time for one conversation"):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 9999999999 }}", "{{ 9999999999 * [0] }}", "{{ 9 ** (9 ** 9) }}", "{{ 'a'.ljust(9999999999) }}",
        "{{ 'a' | center(9999999999) }}", "{{ 'a\nb' | indent(999999999) }}", "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:9999999999}'.format(1) }}", "{{ tools | tojson(indent=999999999) }}", "{{ lipsum(n=9999999) }}", BLOCK,
        "{{ ('a' * 9999999) | replace('', 'aaaaaaaaaa') }}", "{{ ('a' * 9999999).replace('a', 'aaaaaaaaaa') }}",
        *(DOUBLED.replace("EXPRESSION", e) for e in ("ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "ns.x * 2", "[ns.x] * 9")),
    ],
)  # fmt: skip
def test_a_template_that_would_fill_the_memory_is_stopped(source: str) -> None:
    with pytest.raises(Exception, match=r"more than|is given|formats to|undefined"):
        rendered(source)


def test_what_templates_do_is_as_before() -> None:
    source = "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for i in range(3) %}{{ f(i ~ '-' ~ 2) }}{% endfor %}{{ 'a' * 3 + 'b' }}"
    assert rendered(source) == "<0-2><1-2><2-2>aaab"
    assert rendered(
        "{{ '%05.1f' % 2 }}{{ 'a'.center(5) }}|{{ [1, {'a': none}] }}{{ messages | tojson(indent=1) | length }}"
    )
    assert len(rendered("{{ 'a' * 1000000 }}")) == 1_000_000 < LARGEST
    assert (
        rendered("{% for m in messages if m.role == 'user' %}{{ loop.index ~ m.content }}{% else %}none{% endfor %}")
        == "1a"
    )
    call = "{% macro g() %}[{{ caller() }}]{% endmacro %}{% call g() %}x{% endcall %}"
    assert rendered(call) == "[x]"


@pytest.mark.parametrize("settings", ["[1]", DEEP, '{"bos_token": 5, "eos_token": [1]}', '{"chat_template": []}'])
def test_settings_of_a_tokenizer_that_are_none(tmp_path: Path, settings: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(settings)
    assert template_of(tmp_path / "tokenizer.json", DATA) is not None  # the fallback's


@pytest.mark.parametrize(
    "own", [5, {"a": "b"}, [{"name": "default", "template": 5}], [{"name": ["a"], "template": {}}]]
)
def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path, own: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
    assert "in tokenizer_config.json is " in told(lambda: template_of(tmp_path / "tokenizer.json", DATA))


# --- words -------------------------------------------------------------------------------------------------------


def test_no_problem_brings_control_characters_or_megabytes_to_a_terminal() -> None:
    problem = Problem("a\x1b[2Jb\ud800\n\tc" + "x" * 10**6, "\x07", None)
    assert problem.what.startswith("a\\x1b[2Jb\\ud800\n\tcx") and len(problem.what) < LONGEST + 100
    assert (problem.source, problem.remedy) == ("\\x07", None)
    assert Problem("é – 𝔘 …").what == "é – 𝔘 …"


def test_a_template_that_is_slow_every_time_holds_a_check_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check renders a dozen conversations: each used to have the whole time."""
    monkeypatch.setattr("runner.data.template_sandbox.SECONDS", 0.8)
    monkeypatch.setattr("runner.data.template_sandbox.SLOW", 0.05)
    monkeypatch.setattr("runner.data.template_sandbox.LEAST", 0.1)
    began = time.process_time()
    for _ in range(10):
        with pytest.raises(Exception, match="seconds of CPU time"):
            rendered("{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}")
    assert time.process_time() - began < 4  # 0.8 + 0.4 + 0.2 + 7 × 0.1 s; each 0.8 without it
