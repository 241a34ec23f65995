"""`runs`: every run there is, in a blink."""

from __future__ import annotations

import io
import json
import os
import resource
import time
from pathlib import Path

import pytest
from rich.console import Console

from runner.report.run_list import print_runs, run_rows
from tests.conftest import run_cli

LINE = {"step": 7, "loss": 1.25, "learning_rate": 1e-4, "time": 1.0}


def folder(out: Path, name: str, state: str, created: float, **facts: object) -> Path:
    """A run with what a run leaves; its metrics end in a line that was cut short."""
    run = out / name
    (run / "logs").mkdir(parents=True)
    status = {"run_id": name, "state": state, "created": created, "method": "lora", "objective": "sft",
              "data": "[bold] a name of more than 24 columns", "learning_rate": 1e-4, **facts}  # fmt: skip
    (run / "status.json").write_text(json.dumps(status), "utf-8")
    lines = [json.dumps({**LINE, "step": step}) for step in range(1, 8)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "lo']), "utf-8")
    summary = {"seconds": 75.0, "eval": {"after": {"exact_match": 0.5}}, "samples": ["x" * 200] * 20}
    (run / "summary.json").write_text(json.dumps(summary), "utf-8")
    return run


def test_a_thousand_runs_are_listed_in_a_blink(tmp_path: Path) -> None:
    def listed() -> tuple[list[str], float]:
        """What is printed, and the CPU seconds that it took at best."""
        spent = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = run_cli("runs", "--output-dir", str(tmp_path))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == 0
        return done.stdout.splitlines(), min(spent)

    folder(tmp_path, "run-0000", "done", 1000.0)
    _, for_one = listed()
    for number in range(1, 1000):
        folder(tmp_path, f"run-{number:04d}", "done", 1000.0 - number)
    lines, for_all = listed()
    assert len(lines) == 1001
    assert lines[1].startswith("run-0999 done") and lines[-1].startswith("run-0000 done")  # the newest last
    assert for_all < 4 * for_one, (for_all, for_one)  # 0.17 s and 0.08 s


def test_a_row_says_what_differs(tmp_path: Path) -> None:
    folder(tmp_path, "one", "done", 1.0)
    folder(tmp_path, "another", "training", 2.0, pid=2**22 + 1, host=os.uname().nodename)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "status.json").write_text("{", "utf-8")
    rows = run_rows(tmp_path)
    assert [(row["run_id"], row["state"], row["step"]) for row in rows] == [
        ("broken", "unknown", None), ("one", "done", 7), ("another", "killed", 7)
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    print_runs(console, rows, tmp_path)
    assert console.file.getvalue().splitlines() == [
        "run     state   method objective data                       rate steps   loss exact       time",
        "broken  unknown –      –         –                             –     –      –     –          –",
        "one     done    lora   sft       [bold] a name of more t… 0.0001     7 1.2500   50% 1 min 15 s",
        "another killed  lora   sft       [bold] a name of more t… 0.0001     7 1.2500   50% 1 min 15 s",
    ]


@pytest.mark.parametrize(("width", "told"), [(80, False), (120, True)])
def test_a_narrow_terminal_shows_what_the_name_does_not_say(width: int, told: bool, tmp_path: Path) -> None:
    folder(tmp_path, "one", "failed", 1.0)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    print_runs(console, run_rows(tmp_path), tmp_path)
    text = console.file.getvalue()
    assert ("lora" in text) is told and "\x1b[31mfailed\x1b[0m" in text


def listed(*words: str, cwd: Path) -> list[str]:
    return [row["run_id"] for row in json.loads(run_cli("runs", "--json", *words, cwd=cwd, code=0).stdout)]


def test_filters_orders_and_the_best_run(tmp_path: Path) -> None:
    now = time.time()
    for place, (name, model, state, loss) in enumerate(
        [("a", "llama3_8b", "done", 1.5), ("b", "phi2", "done", 1.0), ("c", "llama2_7b", "failed", None),
         ("d", "llama3_8b", "done", 2.0)]
    ):  # fmt: skip
        run = folder(tmp_path / "runs", name, state, now - 86400 * (4 - place), model=model)
        held = {} if loss is None else {"eval": {"after": {"loss": loss, "exact_match": loss / 4}}}
        (run / "summary.json").write_text(json.dumps({"seconds": 10.0 * place, **held}), "utf-8")
        (run / "spec.json").write_text("{}", "utf-8")
    assert listed("--state", "done", "--model", "LLAMA*", cwd=tmp_path) == ["a", "d"]
    assert listed("--since", "60h", cwd=tmp_path) == ["c", "d"] and listed("-n", "1", cwd=tmp_path) == ["d"]
    assert listed("--text", "PHI", cwd=tmp_path) == ["b"] and listed("--method", "full", cwd=tmp_path) == []
    assert listed("--sort", "seconds", "--reverse", "-n", "2", cwd=tmp_path) == ["d", "c"]
    assert listed("--best", "eval.after.loss", cwd=tmp_path) == ["b", "a", "d", "c"]
    assert listed("--best", "eval.after.exact_match", "-n", "1", cwd=tmp_path) == ["d"]  # more is better
    table = run_cli("runs", "--best", "eval.after.loss", cwd=tmp_path, code=0).stdout.splitlines()
    assert "eval.after.loss" in table[0] and table[1].startswith("b ") and "1.0000" in table[1]


def test_a_filter_or_an_order_that_cannot_be_says_what_to_type(tmp_path: Path) -> None:
    folder(tmp_path / "runs", "a", "done", 1.0, model="phi2")
    for words, told in (
        (("--state", "finished"), "one of created"), (("--since", "soon"), "write --since 2h"),
        (("--sort", "los"), "did you mean --sort loss?"), (("--sort", "loss", "--best", "x"), "two orders"),
        (("--best", "exact_match"), "did you mean --best eval.after.exact_match?"),
        (("--state", "done", "delete", "a"), "--state filters the list"),
    ):  # fmt: skip
        assert told in run_cli("runs", *words, cwd=tmp_path, code=2).stderr
    none = run_cli("runs", "--model", "phi3", cwd=tmp_path, code=0).stdout
    assert none == "No run matches --model phi3: runs have phi2\n"
