"""docs/reliability.md states the inputs of a fuzz run that had no failure, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz_results

RUN = """..                       [100%]
================ fuzz: inputs ================
     7,188  chat templates: 7,176 refused in words, 21 s
   118,120  conversations: 108,868 refused in words, 20 s
   125,308  in all
2 passed, 7 warnings in 504.13s
"""


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_results, "FILE", tmp_path / "fuzz.json")


def test_the_inputs_of_all_targets_are_added_up() -> None:
    assert "Not measured yet" in fuzz_results.section()
    fuzz_results.keep([RUN, RUN.replace("chat templates", "rows").replace("conversations", "tables")], "7", "20")
    said = fuzz_results.section()
    assert "**250,616 inputs, 232,088 refused in words, 0 tracebacks, 0 hangs.**" in said
    assert "| conversations | 118,120 | 108,868 |" in said and "FUZZ_SECONDS=20 FUZZ_SEED=7 make fuzz" in said


@pytest.mark.parametrize("output", [RUN.replace("2 passed", "1 failed, 1 passed"), "2 passed in 3 s"])
def test_a_run_that_failed_or_counted_nothing_is_not_kept(output: str) -> None:
    with pytest.raises(ValueError, match=r"failures|no target"):
        fuzz_results.keep([output], "7", "20")
    assert not fuzz_results.FILE.is_file()
