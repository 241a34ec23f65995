"""`data preview`, `data stats`, `data prepare`: what people see before it costs anything."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from runner.data import prepared_index
from runner.data.inspect.stats import histogram, suggested_length
from runner.report.data_tables import bars
from runner.report.progress import Progress
from runner.report.text import counted
from runner.train.tokens import fill_token_cache
from tests.conftest import ROOT, run_cli, spec_of, train_here
from tests.support import preferences
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures

GOOD = '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "[b]4[/b]"}]}\n'


def test_a_preview_shows_format_rows_and_every_mistake(here: Path) -> None:
    (here / "my.jsonl").write_text(GOOD + '{"messages": []}\n{\n')
    result = runner("data", "preview", "data.path=my.jsonl", "model=llama3_8b")
    assert result.exit_code == 2
    assert "my.jsonl: chat, 1 row, 2 wrong" in result.output
    assert "⟦[b]4[/b]\n⟧" in result.output and "[user] 2+2?" in result.output
    assert "line 2: messages is an empty list" in result.output and "line 3: broken JSON" in result.output
    result = runner("data", "preview", "data.path=my.jsonl", "data.on_error=skip", "--json", "model=llama3_8b")
    assert result.exit_code == 0
    found = json.loads(result.output)
    facts = {"name": "my.jsonl", "format": "chat", "num_rows": 1, "num_wrong": 2, "left_out": [], "rewarded": []}
    assert found["files"] == [facts]
    assert [(piece["text"], piece["trained"]) for piece in found["rows"][0]["segments"]][-1] == ("[b]4[/b]\n", True)
    assert len(found["problems"]) == 2


def test_one_mistake_is_said_in_the_singular(here: Path) -> None:
    (here / "my.jsonl").write_text(GOOD + '{"messages": []}\n')
    assert "1 mistake in 1 row;" in runner("data", "preview", "data.path=my.jsonl", "model=llama3_8b").output


def test_pairs_are_shown_side_by_side(here: Path) -> None:
    (here / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    # The kind follows from the data where the objective is supervised: the better answer is learned.
    found = json.loads(runner("data", "preview", "data.path=pairs.jsonl", "--json", "model=llama3_8b").output)
    assert found["files"][0]["format"] == "preference" and found["learns_from"] == "sft"


def test_a_row_is_shown_by_its_number(here: Path) -> None:
    (here / "my.jsonl").write_text("".join(f'{{"text": "number {n}"}}\n' for n in range(1, 31)))
    words = ("data", "preview", "data.path=my.jsonl", "model=llama3_8b", "--json")
    found = json.loads(runner(*words, "--row", "17").output)
    assert [row["content"]["text"] for row in found["rows"]] == ["number 17"]
    assert runner(*words, "--row", "31").exit_code == 2


def test_statistics_of_a_file(here: Path) -> None:
    rows = [{"prompt": f"question {n % 50}", "completion": "word " * (n % 40 + 1)} for n in range(400)]
    (here / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(runner("data", "stats", "data.path=my.jsonl", "model=llama3_8b", "--json").output)
    assert (found["num_rows"], found["num_held_out"]) == (380, 20)
    assert sum(one["rows"] for one in found["histogram"]) == 380
    assert found["duplicates"]["rows"] > 0 and found["duplicates"]["prompts"] == 330
    at = {one["max_length"]: one for one in found["at_length"]}
    assert at[128]["packed_share"] > 0.9 > at[128]["padded_share"]
    text = runner("data", "stats", "data.path=my.jsonl", "model=llama3_8b", "--plot", "lengths.png")
    assert "380 to train on, 20 held out" in text.output and "█" in text.output
    assert (here / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert runner("data", "stats", "data.path=my.jsonl", "model=llama3_8b", "--plot", "x.doc").exit_code == 2


def test_sixty_rows_fall_into_few_classes() -> None:
    lengths = sorted([45] * 20 + list(range(100, 140)))
    found = histogram(lengths)
    assert [one["from"] for one in found] == [40, 60, 80, 100, 120]
    assert len(histogram([45, 46, 47, 47, 48, 49])) == 5  # lengths that differ little are told apart


def test_classes_of_a_histogram_are_round_and_complete() -> None:
    found = histogram([3, 5, 5, 97])
    assert found[0] == {"from": 0, "to": 20, "rows": 3} and found[-1] == {"from": 80, "to": 100, "rows": 1}
    assert sum(one["rows"] for one in found) == 4 and len(found) <= 24
    assert bars(found)[0].endswith("█ 3") and bars(found)[1].endswith("  0")
    assert suggested_length(list(range(1, 101)), None) == 128 and suggested_length([5000], 4096) == 4096


def test_the_front_of_data_stays_light(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text(GOOD)
    code = (
        "import sys; from click.testing import CliRunner; from runner.cli.main import cli;"
        "r = CliRunner().invoke(cli, ['data', 'preview', 'data.path=my.jsonl']); assert r.exit_code == 0, r.output;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("verb", ["preview", "stats", "prepare"])
def test_help_has_examples(verb: str) -> None:
    result = runner("data", verb, "--help")
    assert result.exit_code == 0 and f"python -m runner data {verb}" in result.output


@pytest.mark.parametrize("objective", ["sft", "pretrain", "dpo", "kto", "orpo", "reward", "grpo"])
def test_what_is_prepared_is_all_that_the_run_takes(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    own = {"grpo": ["objective.rewards=[length]", "objective.num_generations=2", "objective.max_new_tokens=4"]}
    words = preferences.words(tmp_path, f"objective={objective}", "train.max_steps=1", *own.get(objective, []))
    if objective == "pretrain":
        preferences.write(tmp_path / "text.jsonl", [{"text": "The door is red. " * 9}] * 20)
        words.append(f"data.path={tmp_path / 'text.jsonl'}")
    spec = spec_of(*words)
    found = fill_token_cache.fill_cache(spec, Progress(Console(file=io.StringIO())))
    there = sorted((tmp_path / "cache" / "tokenised").iterdir())
    assert sorted(found["folders"]) == [str(folder) for folder in there] and len(there) == 2  # to learn, and held out
    assert not found["from_cache"] and found["num_tokens"] > 0 and found["num_held_out"] > 0
    assert sorted(prepared_index.prepared_folders(spec)) == [f"tokenised/{folder.name}" for folder in there]
    train_here(spec)
    assert sorted((tmp_path / "cache" / "tokenised").iterdir()) == there


@pytest.mark.slow
def test_prepared_tokens_are_found_by_the_run(tmp_path: Path) -> None:
    """With the real tokenizer: the second time everything comes from the cache that the run looks into."""
    (tmp_path / "my.jsonl").write_text(GOOD * 30)
    words = ("data", "prepare", "data.path=my.jsonl", "train.max_length=128", "--json")
    first, second = (run_cli(*words, cwd=tmp_path) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert not re.search("warning|Traceback|Retry|unauthenticated", first.stderr, re.IGNORECASE)
    found = json.loads(second.stdout)
    assert found["from_cache"] and (found["num_examples"], found["num_held_out"]) == (28, 2)
    (tmp_path / "my.jsonl").write_text('{"text": ""}\n')
    wrong = run_cli(*words, cwd=tmp_path)
    assert wrong.returncode == 2 and "text is empty" in wrong.stdout


@pytest.mark.parametrize(
    ("number", "noun", "said"), [(1, "row", "1 row"), (0, "row", "0 rows"), (2048, "process", "2,048 processes")]
)
def test_one_is_not_many(number: int, noun: str, said: str) -> None:
    assert counted(number, noun) == said
