"""`make mutants`: what it changes and which tests it runs are there, and its figures count what they say."""

from __future__ import annotations

import pytest

from benchmarks import mutants
from benchmarks.bench import ROOT

SHOWN = """\
# runner.plan.cost.x_hours__mutmut_12: survived
--- runner/plan/cost.py
+++ runner/plan/cost.py
@@ -9,2 +9,2 @@
     setup_s = 1
-    parts = load_gb / LOAD_GB_S
+    parts = load_gb * LOAD_GB_S
"""
SURVIVOR = {
    "function": "runner.plan.cost.x_hours", "was": "parts = load_gb / LOAD_GB_S", "is": "parts = load_gb * LOAD_GB_S",
}  # fmt: skip


@pytest.mark.parametrize("file", mutants.TESTS)
def test_a_file_that_is_changed_and_the_tests_of_it_are_there(file: str) -> None:
    assert (ROOT / file).is_file()
    tests = [word for word in mutants.TESTS[file] if word.startswith("tests/")]  # the others are options of pytest
    assert tests and all((ROOT / test).is_file() for test in tests)
    assert "test_planning_page" not in str(mutants.TESTS[file])  # the code's own output kills nothing


def test_a_survivor_is_known_by_its_function_and_the_lines_that_differ() -> None:
    assert mutants._difference(SHOWN) == SURVIVOR


def test_a_survivor_with_a_reason_does_not_count_against_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"killed": 7, "timed out": 1, "untested": 1, "survived": 2}
    found = {
        "states": states,
        "survivors": [SURVIVOR, SURVIVOR | {"is": "parts = 0"}],
        "date": "2026-11-30",
        "commit": "a",
    }
    measured = {"files": {"runner/plan/cost.py": found}}
    assert "| 11 | 8 | 1 | 2 | 0 | 73% |" in mutants.section(measured)
    monkeypatch.setattr(mutants, "justified", lambda: [SURVIVOR | {"reason": "the same"}])
    assert "| 11 | 8 | 1 | 2 | 1 | 80% |" in mutants.section(measured)
    measured["files"]["runner/plan/cost.py"] |= {"sample_of": 105, "seed": 0}
    assert "| sample of 11 of 105 | 8 | 1 | 2 | 1 | 80% |" in mutants.section(measured)


def test_every_justified_survivor_has_its_reason_and_its_lines_are_still_there() -> None:
    for one in mutants.justified():
        assert {*one} == {"function", "was", "is", "reason"} and len(one["reason"]) > 20
        file = one["function"].rpartition(".")[0].replace(".", "/") + ".py"
        lines = {line.strip() for line in (ROOT / file).read_text("utf-8").splitlines()}
        gone = [line for line in one["was"].splitlines() if line not in lines]
        assert not gone, f"{file} has no line {gone[0]!r} any more: delete that entry of {mutants.JUSTIFIED.name}"
